"""Frozen BNs by whomever: which modules are one, in training too. That is tried out, since any code may be one."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
VECTORS = ("weight", "bias", "running_mean", "running_var")
Flags = tuple[object, ...]
_PLAIN = (bool, int, float, str, Enum, type(None))
_CONTAINERS = (list, dict, set, deque)
# Frozen BNs, with the flags they were tried with: trying costs as much as a small layer.
_frozen: WeakKeyDictionary[nn.Module, Flags] = WeakKeyDictionary()


def is_frozen(norm: nn.Module) -> bool:
    """A BN with fixed statistics, in training too: it has weight, bias, running_mean, running_var, eps, and uses them.

    That is tried out, forward and backward, on vectors that are not its own, and again when something of it has
    changed: a flag, its class or forward, whether its weights are trained, or what else it holds as a tensor.
    """
    flags = tuple((name, _flag(getattr(norm, name, None))) for name in _flag_names(norm))
    trained = tuple(bool(getattr(getattr(norm, name, None), "requires_grad", False)) for name in VECTORS[:2])
    return _is_frozen(norm, flags, trained)


def _flag(value: object) -> object:
    """What may change what is computed; of a float, whose value torch.compile may not know, whether it is zero."""
    if isinstance(value, float) and torch.compiler.is_compiling():
        if value == 0:
            return "zero"
        return "not zero"
    return value


def _flag_names(norm: nn.Module) -> tuple[str, ...]:
    """The attributes, its own and its class's, that may say what its forward does."""
    kinds = type(norm).__mro__[: type(norm).__mro__.index(nn.Module)]
    held = {name: value for holder in (*kinds, norm) for name, value in vars(holder).items()}
    plain = [name for name, value in held.items() if isinstance(value, _PLAIN) and not name.startswith("__")]
    return tuple(name for name in plain if name not in ("training", "momentum", "eps"))


def _other_tensors(norm: nn.Module) -> Iterator[Tensor]:
    """What it holds beside a BN's own."""
    yield from (tensor for name, tensor in norm.named_parameters() if name not in VECTORS)
    yield from (
        tensor for name, tensor in norm.named_buffers() if name not in VECTORS and name != "num_batches_tracked"
    )


def _is_frozen(norm: nn.Module, flags: Flags, trained: tuple[bool, ...]) -> bool:
    vectors: list[Any] = [getattr(norm, vector, None) for vector in VECTORS]
    if not all(isinstance(vector, Tensor) and vector.dim() == 1 for vector in vectors) or not eps_of(norm) >= 0:
        return False
    others = list(_other_tensors(norm))
    kinds = tuple((type(module), type(module).forward) for module in norm.modules())
    versions = tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in others)
    flags = (flags, trained, kinds, versions)
    if norm in _frozen and _frozen[norm] == flags:
        return True
    if any(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in others):
        return False  # it would be trained, and a BN has no such thing
    # Where it is exported, on the meta device or under vmap there are no values; those of the trial are put there.
    values = all(_has_values(vector) for vector in vectors)
    # In a thread of its own, where none of this one's modes is on, no transform, no hook on saved tensors, no tracing.
    with ThreadPoolExecutor(1) as thread:
        frozen = thread.submit(_acts_frozen, norm, values, trained).result()
    if frozen and values:
        _frozen[norm] = flags
    return frozen


# What torch.compiler.assume_constant_result does, which imports all of the compiler. The flags are read between the
# two, so that a graph is compiled again when one of them changes.
_flag_names._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_frozen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_values(tensor: Tensor) -> bool:
    wrapped: bool = torch._C._functorch.is_batchedtensor(tensor)
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not wrapped


class Images(NamedTuple):
    """What a norm is tried on."""

    number: int
    height: int
    width: int
    needs_gradient: bool
    grad_mode: bool


TRIALS = (Images(2, 5, 4, True, True), Images(3, 1, 1, False, True), Images(2, 1, 2, False, False))


def _acts_frozen(norm: nn.Module, values: bool, trained: tuple[bool, ...]) -> bool:
    """As its class does with any vectors; one that keeps what it made of them, with its own."""
    own: list[Any] = [getattr(norm, name) for name in VECTORS]
    with own[0].device if values else torch.device("cpu"):
        ramp = torch.linspace(-1, 1, len(own[0]), dtype=torch.float64)
        others = [1.5 + ramp / 2, ramp / 3, ramp.flip(0), 1.2 + ramp / 2]
        return any(
            all(_is_right(norm, vectors, trained, images) for images in TRIALS)
            for vectors in ((others, own) if values else (others,))
        )


def _is_right(norm: nn.Module, vectors: list[Tensor], trained: tuple[bool, ...], images: Images) -> bool:
    """Whether a norm with these vectors does what a BN with fixed statistics does, forward and backward."""
    probe: Any = _copy(norm).train()
    if probe.weight.dtype in (torch.bfloat16, torch.float16):  # too coarse to tell one BN from another
        probe.float()
    with torch.no_grad():
        for name, vector in zip(VECTORS, vectors, strict=True):
            getattr(probe, name).copy_(vector)
    weight, bias, mean, var = (getattr(probe, name).detach().double() for name in VECTORS)
    # Far from the mean: by their own statistics all would be within some deviations of it.
    far = torch.linspace(-30, -10, images.number * images.height * images.width, dtype=torch.float64)
    deviation = var.sqrt().clamp_min(1e-3)[:, None, None]
    x = mean[:, None, None] + deviation * far.view(images.number, 1, images.height, images.width)
    x = x.to(probe.weight.dtype)
    needs = (images.needs_gradient, *trained)
    inputs = [t.requires_grad_(needed) for t, needed in zip((x, probe.weight, probe.bias), needs, strict=True)]
    exact = [t.requires_grad_(needed) for t, needed in zip((x.detach().double(), weight, bias), needs, strict=True)]
    with torch.set_grad_enabled(images.grad_mode):
        found = _run(norm, probe, x)
        expected = F.batch_norm(exact[0], mean, var, weight, bias, eps=eps_of(norm))
    if found is None or not _close(found, expected, 64 * torch.finfo(found.dtype).eps):
        return False
    if (expected - bias[:, None, None]).abs().max() < 1e-2 * (1 + bias.abs().max()):
        return False  # with weights of almost nothing any BN returns its bias
    if found.requires_grad != expected.requires_grad:
        return False
    return not found.requires_grad or _same_gradients(found, inputs, expected, exact)


def _same_gradients(found: Tensor, inputs: list[Tensor], expected: Tensor, exact: list[Tensor]) -> bool:
    asked = [i for i, tensor in enumerate(exact) if tensor.requires_grad]
    wave = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).view(expected.shape)
    wanted = torch.autograd.grad(expected, [exact[i] for i in asked], wave)
    try:
        got = torch.autograd.grad(found, [inputs[i] for i in asked], wave.to(found.dtype), allow_unused=True)
    except Exception:  # of its own code
        return False
    tolerance = torch.finfo(found.dtype).eps ** 0.5
    return all(
        one is not None and _close(one, other, tolerance * (1 + float(other.abs().max())))
        for one, other in zip(got, wanted, strict=True)
    )


def _run(norm: nn.Module, probe: nn.Module, x: Tensor) -> Tensor | None:
    """What its class's forward makes of x on a copy of it; None where that fails or changes what it holds."""
    forward: Any = type(norm).forward  # hooks are not for this
    before, counts = [tensor.detach().clone() for tensor in _tensors(probe)], _counts(probe)
    try:
        out = forward(probe, x)
    except Exception:  # of its own code
        return None
    now = _tensors(probe)
    same = len(now) == len(before) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        for one, other in zip(now, before, strict=True)
    )
    return out if same and _counts(probe) == counts and isinstance(out, Tensor) and out.shape == x.shape else None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _counts(module: nn.Module) -> dict[str, object]:
    """The numbers it keeps, and how much is in its containers."""
    held = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    numbers = {name: value for name, value in held.items() if type(value) in (int, float)}
    return numbers | {name: len(value) for name, value in held.items() if isinstance(value, _CONTAINERS)}


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool(((found.double() - expected).abs() <= tolerance * (1 + expected.abs())).all())


def twin(module: Module) -> Module:
    """Another module that holds the same: what is put into its parameters, buffers, modules or hooks is its own."""
    new = copy.copy(module)
    new.__dict__.update({name: value.copy() for name, value in vars(module).items() if isinstance(value, dict)})
    return new


def _copy(module: nn.Module) -> Any:
    """With tensors, containers and modules of its own, and all else shared: not everything can be copied."""
    new = twin(module)
    for held in (vars(new), *(value for value in vars(new).values() if isinstance(value, dict))):
        held.update({name: _own(value) for name, value in held.items()})
    return new


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        own = (
            value.detach().clone() if _has_values(value) else torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        )
        return nn.Parameter(own, requires_grad=False) if isinstance(value, nn.Parameter) else own
    if type(value) in (list, set, deque):  # dicts are `twin`'s
        return value.copy()
    return _copy(value) if isinstance(value, nn.Module) else value


def eps_of(norm: nn.Module) -> float:
    eps: Any = getattr(norm, "eps", None)
    return float(eps) if isinstance(eps, int | float) else -1.0

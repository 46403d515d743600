"""Frozen BNs by whomever: which modules are one, in training too. That is tried out, since any code may be one."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

Module = TypeVar("Module", bound=nn.Module)
VECTORS = ("weight", "bias", "running_mean", "running_var")
_PLAIN = (bool, int, float, str, Enum, type(None))
_COLLECTIONS = (list, set, deque)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Tried(NamedTuple):
    """What a norm was when it was found to be frozen: its flags, and its tensors with their versions."""

    flags: object
    tensors: object


_frozen: WeakKeyDictionary[nn.Module, _Tried] = WeakKeyDictionary()  # trying costs as much as a layer


def is_frozen(norm: nn.Module) -> bool:
    """A BN with fixed statistics, in training too: it has weight, bias, running_mean, running_var, eps, and uses them.

    That is tried out, forward and backward, on vectors that are not its own and on those that are, and again when
    something of it has changed: its mode, a flag, its class or forward, whether its weights are trained, or what else
    it holds as a tensor.
    """
    flags = tuple((name, _flag(name, getattr(norm, name, None))) for name in _flag_names(norm))
    trained = tuple(bool(getattr(getattr(norm, name, None), "requires_grad", False)) for name in VECTORS[:2])
    return _is_frozen(norm, (*flags, norm.training), trained)


def _flag(name: str, value: object) -> object:
    """What may change what is computed; of a float, whose value torch.compile may not know, whether it is zero."""
    if isinstance(value, float) and (name == "momentum" or torch.compiler.is_compiling()):
        if value == 0:
            return "zero"
        return "not zero"
    return value


def _flag_names(norm: nn.Module) -> tuple[str, ...]:
    """The attributes, its own and its class's, that may say what its forward does."""
    kinds = type(norm).__mro__[: type(norm).__mro__.index(nn.Module)]
    held = {name: value for holder in (*kinds, norm) for name, value in vars(holder).items()}
    plain = [name for name, value in held.items() if isinstance(value, _PLAIN) and not name.startswith("__")]
    return tuple(name for name in plain if name != "training")


def _is_frozen(norm: nn.Module, flags: object, trained: tuple[bool, ...]) -> bool:
    vectors: list[Any] = [getattr(norm, vector, None) for vector in VECTORS]
    if not all(isinstance(v, Tensor) and v.dim() == 1 and len(v) == len(vectors[0]) for v in vectors):
        return False
    if not eps_of(norm) >= 0:
        return False
    # Where it is exported, on the meta device or under vmap there are no values; those of the trial are put there.
    values = all(_has_values(vector) for vector in vectors)
    others = list(_others(norm))
    now, before = _Tried((flags, trained, _kinds(norm)), _versions(others)), _frozen.get(norm)
    same = before is not None and before.flags == now.flags
    if before and same and (not values or before.tensors in (now.tensors, _versions([*others, *vectors]))):
        return True
    if any(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in others):
        return False  # it would be trained, and a BN has no such thing
    with _apart(), vectors[0].device if values else torch.device("cpu"):
        of_its_class = _acts_frozen(norm, _any_vectors(len(vectors[0]), eps_of(norm)), trained)
        frozen = _acts_frozen(norm, vectors, trained, alone=not of_its_class) if values else of_its_class
    if frozen and values:
        # One that keeps what it made of its vectors counts as long as those are what they were.
        _frozen[norm] = now if of_its_class else now._replace(tensors=_versions([*others, *vectors]))
    return frozen


# What torch.compiler.assume_constant_result does, which imports all of the compiler. The flags are read between the
# two, so that a graph is compiled again when one of them changes.
_flag_names._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_frozen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _others(norm: nn.Module) -> Iterator[Tensor]:
    """The tensors that it holds beside a BN's own."""
    own = (*VECTORS, "num_batches_tracked")
    for module in norm.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for name, value in held.items():
                if isinstance(value, Tensor) and (module is not norm or name not in own):
                    yield value


def _versions(tensors: list[Tensor]) -> object:
    return tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def _kinds(norm: nn.Module) -> object:
    """Classes and their forwards; of the modules that it holds the plain attributes, too."""
    modules = [(type(module), type(module).forward) for module in norm.modules()]
    inside = [value for m in norm.children() for value in vars(m).values() if isinstance(value, _PLAIN)]
    return modules, inside


def _has_values(tensor: Tensor) -> bool:
    wrapped: bool = torch._C._functorch.is_batchedtensor(tensor)
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not wrapped


@contextmanager
def _apart() -> Iterator[None]:
    """Without the modes, transforms and hooks on saved tensors that are on now.

    Not in another thread, which would wait for locks that this one holds: torch.compile's, or a user's.
    """
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(temporarily_clear_interpreter_stack())
        # torch.func's transforms have none, and allow none.
        if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


class _Images(NamedTuple):
    """What a norm is tried on."""

    number: int
    height: int
    width: int
    needs_gradient: bool
    grad_mode: bool


_TRIALS = (_Images(2, 5, 4, True, True), _Images(3, 1, 1, False, True), _Images(1, 1, 2, False, False))


def _any_vectors(channels: int, eps: float) -> list[Tensor]:
    """Weights of both signs, and variances from well below eps."""
    ramp = torch.linspace(-1, 1, channels, dtype=torch.float64)
    sign = 1 - 2 * (torch.arange(channels) % 2)
    var = torch.logspace(math.log10(max(eps, 1e-6) / 4), 0.3, channels, dtype=torch.float64)
    return [sign * (1.5 + ramp / 2), ramp / 3, ramp.flip(0) * var.sqrt(), var]


def _acts_frozen(norm: nn.Module, vectors: list[Tensor], trained: tuple[bool, ...], alone: bool = False) -> bool:
    """In the mode it is in, and told to train; `alone` where these vectors must tell one BN from another."""
    modes = (False,) if all(module.training for module in norm.modules()) else (False, True)
    return all(_is_right(norm, told, vectors, trained, images, alone) for told in modes for images in _TRIALS)


def _is_right(
    norm: nn.Module, told: bool, vectors: list[Tensor], trained: tuple[bool, ...], images: _Images, alone: bool
) -> bool:
    """Whether a norm with these vectors does what a BN with fixed statistics does, forward and backward."""
    probe: Any = _copy(norm).train() if told else _copy(norm)
    tolerance = 64 * torch.finfo(probe.weight.dtype).eps
    if probe.weight.dtype in (torch.bfloat16, torch.float16):  # too coarse to tell one BN from another
        tolerance = tolerance / 8 if alone else 64 * torch.finfo(torch.float32).eps
        probe.float()
    with torch.no_grad():
        for name, vector in zip(VECTORS, vectors, strict=True):
            getattr(probe, name).copy_(vector)
    weight, bias, mean, var = (getattr(probe, name).detach().double() for name in VECTORS)
    # Far from the mean, most on one side: by their own statistics all would be within some deviations of it.
    far = torch.linspace(-30, 10, images.number * images.height * images.width, dtype=torch.float64)
    deviation = var.sqrt().clamp_min(1e-3)[:, None, None]
    x = mean[:, None, None] + deviation * far.view(images.number, 1, images.height, images.width)
    x = x.to(probe.weight.dtype)
    needs = (images.needs_gradient, *trained)
    inputs = [t.requires_grad_(needed) for t, needed in zip((x, probe.weight, probe.bias), needs, strict=True)]
    exact = [t.requires_grad_(needed) for t, needed in zip((x.detach().double(), weight, bias), needs, strict=True)]
    with torch.set_grad_enabled(images.grad_mode):
        found = _run(norm, probe, x)
        expected = F.batch_norm(exact[0], mean, var, weight, bias, eps=eps_of(norm))
    # x·scale + shift may cancel.
    terms = (exact[0] * (weight * (var + eps_of(norm)).rsqrt())[:, None, None]).abs()
    if found is None or not _close(found, expected, tolerance * (1 + expected.abs() + terms)):
        return False
    if alone and not (expected - bias[:, None, None]).abs().max() > 1e-2 * (1 + bias.abs().max()):
        return False  # with weights of almost nothing any BN returns its bias
    if found.requires_grad != expected.requires_grad:
        return False
    return not found.requires_grad or _same_gradients(found, inputs, expected, exact, tolerance)


def _same_gradients(
    found: Tensor, inputs: list[Tensor], expected: Tensor, exact: list[Tensor], tolerance: float
) -> bool:
    asked = [i for i, tensor in enumerate(exact) if tensor.requires_grad]
    wave = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).view(expected.shape)
    wanted = torch.autograd.grad(expected, [exact[i] for i in asked], wave)
    try:
        got = torch.autograd.grad(found, [inputs[i] for i in asked], wave.to(found.dtype), allow_unused=True)
    except Exception:  # of its own code
        return False
    return all(
        one is not None and _close(one, other, tolerance**0.5 * (1 + other.nan_to_num().abs().max()))
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
    """The numbers it keeps, and how much it has collected."""
    held = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    numbers = {name: value for name, value in held.items() if type(value) in (int, float)}
    return numbers | {name: len(value) for name, value in held.items() if isinstance(value, _COLLECTIONS)}


def _close(found: Tensor, expected: Tensor, tolerance: Tensor) -> bool:
    """Where values overflow or are NaN, in both."""
    known = expected.isfinite()
    return torch.equal(known, found.isfinite()) and bool(((found.double() - expected).abs() <= tolerance)[known].all())


def twin(module: Module) -> Module:
    """Another module that holds the same: what is put into its parameters, buffers, modules or hooks is its own."""
    new = copy.copy(module)
    new.__dict__.update({name: value.copy() for name, value in vars(module).items() if isinstance(value, dict)})
    return new


def _copy(module: nn.Module) -> Any:
    """With tensors, collections and modules of its own, no hooks, and all else shared: not everything can be copied."""
    new = twin(module)
    for hooks in _HOOKS:
        vars(new)[hooks].clear()
    for held in (vars(new), *(value for value in vars(new).values() if isinstance(value, dict))):
        held.update({name: _own(value) for name, value in held.items()})
    return new


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        own = (
            value.detach().clone() if _has_values(value) else torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        )
        return nn.Parameter(own, requires_grad=False) if isinstance(value, nn.Parameter) else own
    if type(value) in _COLLECTIONS:  # dicts are `twin`'s
        return value.copy()
    return _copy(value) if isinstance(value, nn.Module) else value


def eps_of(norm: nn.Module) -> float:
    eps: Any = getattr(norm, "eps", None)
    return float(eps) if isinstance(eps, int | float) else -1.0

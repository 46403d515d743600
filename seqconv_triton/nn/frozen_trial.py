"""Does a module compute as a BN with fixed statistics does? Tried out on a copy of it, forward and backward."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

Module = TypeVar("Module", bound=nn.Module)
VECTORS = ("weight", "bias", "running_mean", "running_var")
_COLLECTIONS = (list, set, deque)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_values(tensor: Tensor) -> bool:
    """Not where it is exported, on the meta device or under vmap."""
    wrapped: bool = torch._C._functorch.is_batchedtensor(tensor)
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not wrapped


@contextmanager
def apart() -> Iterator[None]:
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


class Images(NamedTuple):
    """What a norm is tried on."""

    number: int
    height: int
    width: int
    needs_gradient: bool
    grad_mode: bool


TRIALS = (Images(2, 5, 4, True, True), Images(3, 1, 1, False, True), Images(1, 1, 2, False, False))


def any_vectors(channels: int, eps: float) -> list[Tensor]:
    """Weights of both signs, and variances from well below eps."""
    ramp = torch.linspace(-1, 1, channels, dtype=torch.float64)
    sign = 1 - 2 * (torch.arange(channels) % 2)
    var = torch.logspace(math.log10(max(eps, 1e-6) / 4), 0.3, channels, dtype=torch.float64)
    return [sign * (1.5 + ramp / 2), ramp / 3, ramp.flip(0) * var.sqrt(), var]


def acts_frozen(norm: nn.Module, vectors: list[Tensor], trained: tuple[bool, ...], alone: bool = False) -> bool:
    """In the mode it is in, and told to train; `alone` where these vectors must tell one BN from another."""
    modes = (False,) if all(module.training for module in norm.modules()) else (False, True)
    return all(_is_right(norm, told, vectors, trained, images, alone) for told in modes for images in TRIALS)


def _is_right(
    norm: nn.Module, told: bool, vectors: list[Tensor], trained: tuple[bool, ...], images: Images, alone: bool
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
    if len(now) != len(before) or not all(map(same, now, before)) or _counts(probe) != counts:
        return None
    return out if isinstance(out, Tensor) and out.shape == x.shape else None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _counts(module: nn.Module) -> dict[str, object]:
    """The numbers it keeps, and how much it has collected."""
    held = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    numbers = {name: value for name, value in held.items() if type(value) in (int, float)}
    return numbers | {name: len(value) for name, value in held.items() if isinstance(value, _COLLECTIONS)}


def same(one: object, other: Tensor, tolerance: float = 0.0) -> bool:
    """To the bit, or within a relative tolerance; or NaN in both."""
    return (
        isinstance(one, Tensor)
        and (one.shape, one.dtype) == (other.shape, other.dtype)
        and torch.allclose(one.detach(), other, rtol=tolerance, atol=0, equal_nan=True)
    )


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
        own = value.detach().clone() if has_values(value) else torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        return nn.Parameter(own, requires_grad=False) if isinstance(value, nn.Parameter) else own
    if type(value) in _COLLECTIONS:  # dicts are `twin`'s
        return value.copy()
    return _copy(value) if isinstance(value, nn.Module) else value


def eps_of(norm: nn.Module) -> float:
    eps: Any = getattr(norm, "eps", None)
    return float(eps) if isinstance(eps, int | float) else -1.0

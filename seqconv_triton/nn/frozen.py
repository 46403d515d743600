"""Frozen BNs by whomever: which modules are one, in training too. That is tried out, since any code may be one."""

from __future__ import annotations

import copy
from enum import Enum
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

Module = TypeVar("Module", bound=nn.Module)
VECTORS = ("weight", "bias", "running_mean", "running_var")
Flags = tuple[tuple[str, object], ...]
_PLAIN = (bool, int, float, str, Enum, type(None))
# Frozen BNs, with the flags they were tried with: trying costs as much as a small layer.
_frozen: WeakKeyDictionary[nn.Module, Flags] = WeakKeyDictionary()


def is_frozen(norm: nn.Module) -> bool:
    """A BN with fixed statistics, in training too: it has weight, bias, running_mean, running_var, eps, and uses them.

    That is tried out, on vectors that are not its own, and again when a flag of it has changed; where there are none,
    one without `momentum` is believed.
    """
    return _is_frozen(norm, tuple((name, _flag(getattr(norm, name, None))) for name in _flag_names(norm)))


def _flag(value: object) -> object:
    """What may change what is computed; of a float, which torch.compile may not know, whether it is zero."""
    if isinstance(value, float):
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


def _is_frozen(norm: nn.Module, flags: Flags) -> bool:
    vectors: list[Any] = [getattr(norm, vector, None) for vector in VECTORS]
    if not all(isinstance(vector, Tensor) and vector.dim() == 1 for vector in vectors) or not eps_of(norm) >= 0:
        return False
    if norm in _frozen and _frozen[norm] == flags:
        return True
    # Where it is exported or on the meta device there are no values; those of the trial are put there.
    values = all(type(v) in (Tensor, nn.Parameter) and not v.is_meta for v in vectors)
    device = vectors[0].device if values else torch.device("cpu")
    with _disable_current_modes(), torch.no_grad(), device:
        frozen = _acts_frozen(norm, values)
    if frozen and values:
        _frozen[norm] = flags
    return frozen


# What torch.compiler.assume_constant_result does, which imports all of the compiler. The flags are read between the
# two, so that a graph is compiled again when one of them changes.
_flag_names._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_frozen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _acts_frozen(norm: nn.Module, values: bool) -> bool:
    """As its class does with any vectors; one that keeps what it made of them, with its own.

    Of that kind and without values, one without `momentum` is believed if no image changes another's output.
    """
    weight: Any = norm.weight
    ramp = torch.linspace(-1, 1, len(weight), dtype=torch.float64)
    others = (1.5 + ramp / 2, ramp / 3, ramp.flip(0), 1.2 + ramp / 2)
    probe = _trial(norm)
    if probe.weight.dtype in (torch.bfloat16, torch.float16):  # too coarse to tell one BN from another
        probe.float()
    for name, vector in zip(VECTORS, others, strict=True):
        getattr(probe, name).copy_(vector)
    if _computes_with_its_vectors(norm, probe):
        return True
    if values:  # where its weights are zero, any BN returns zeros
        return bool(weight.any()) and _computes_with_its_vectors(norm, _trial(norm))
    return not hasattr(norm, "momentum") and _takes_images_alone(norm, probe)


def _trial(norm: nn.Module) -> Any:
    return _copy(norm).train()


def _pixels(probe: Any) -> Tensor:
    """Two images far from the mean: by their own statistics both would be within one deviation of it."""
    deviation = probe.running_var.double().sqrt()
    x = torch.stack([probe.running_mean - 30 * deviation, probe.running_mean - 10 * deviation])
    return x[:, :, None, None].to(probe.weight.dtype)


def _run(norm: nn.Module, probe: Any, x: Tensor) -> Tensor | None:
    """What its class's forward makes of x on a copy of it; None where that fails or moves a vector."""
    forward: Any = type(norm).forward  # hooks are not for this
    held = [getattr(probe, name).clone() for name in VECTORS]
    try:
        out = forward(probe, x)
    except Exception:  # of its own code
        return None
    now = (getattr(probe, name) for name in VECTORS)
    unmoved = all(torch.allclose(*pair, rtol=0, atol=0, equal_nan=True) for pair in zip(now, held, strict=True))
    return out if unmoved and isinstance(out, Tensor) and out.shape == x.shape else None


def _computes_with_its_vectors(norm: nn.Module, probe: Any) -> bool:
    """As a BN with fixed statistics does."""
    x = _pixels(probe)
    weight, bias, mean, var = (getattr(probe, name).double() for name in VECTORS)
    found = _run(norm, probe, x)
    return found is not None and _close(found, F.batch_norm(x.double(), mean, var, weight, bias, eps=eps_of(norm)))


def _takes_images_alone(norm: nn.Module, probe: Any) -> bool:
    x = _pixels(probe)
    together, alone = _run(norm, probe, x), _run(norm, probe, x[:1])
    return together is not None and alone is not None and _close(together[:1], alone.double())


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 64 * torch.finfo(found.dtype).eps * (1 + expected.abs())
    return bool(((found.double() - expected).abs() <= tolerance).all())


def twin(module: Module) -> Module:
    """Another module that holds the same: what is put into its parameters, buffers, modules or hooks is its own."""
    new = copy.copy(module)
    new.__dict__.update({name: value.copy() for name, value in vars(module).items() if isinstance(value, dict)})
    return new


def _copy(module: nn.Module) -> Any:
    """With tensors and modules of its own, and all else shared: not everything in a module can be copied."""
    new = twin(module)
    for held in (vars(new), *(value for value in vars(new).values() if isinstance(value, dict))):
        held.update({name: _own(value) for name, value in held.items()})
    return new


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        if type(value) in (Tensor, nn.Parameter) and not value.is_meta:
            own = value.detach().clone()
        else:
            own = torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        return nn.Parameter(own, requires_grad=False) if isinstance(value, nn.Parameter) else own
    return _copy(value) if isinstance(value, nn.Module) else value


def eps_of(norm: nn.Module) -> float:
    eps: Any = getattr(norm, "eps", None)
    return float(eps) if isinstance(eps, int | float) else -1.0

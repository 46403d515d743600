"""Which modules are frozen BNs, by whomever, in training too: any code may be one, so that it is tried out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from seqconv_triton.nn.frozen_trial import VECTORS, acts_frozen, any_vectors, apart, eps_of, has_values

_PLAIN = (bool, int, float, str, Enum, type(None))


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
    # torch.compile hands numbers over to functions that it calls as it compiles, and modules not in every version.
    given = id(norm) if torch.compiler.is_dynamo_compiling() else norm
    flags = tuple((name, _flag(name, getattr(norm, name, None))) for name in _flag_names(given))
    trained = tuple(bool(getattr(getattr(norm, name, None), "requires_grad", False)) for name in VECTORS[:2])
    return _is_frozen(given, (*flags, norm.training), trained)


def _module(given: nn.Module | int) -> nn.Module:
    """The module, or what is at its address: whoever traces holds it."""
    if isinstance(given, int):
        found: nn.Module = ctypes.cast(given, ctypes.py_object).value
        return found
    return given


def _flag(name: str, value: object) -> object:
    """What may change what is computed; of a float, whose value torch.compile may not know, whether it is zero."""
    if isinstance(value, float) and (name == "momentum" or torch.compiler.is_compiling()):
        if value == 0:
            return "zero"
        return "not zero"
    return value


def _flag_names(given: nn.Module | int) -> tuple[str, ...]:
    """The attributes, its own and its class's, that may say what its forward does."""
    norm = _module(given)
    kinds = type(norm).__mro__[: type(norm).__mro__.index(nn.Module)]
    held = {name: value for holder in (*kinds, norm) for name, value in vars(holder).items()}
    plain = [name for name, value in held.items() if isinstance(value, _PLAIN) and not name.startswith("__")]
    return tuple(name for name in plain if name != "training")


def _is_frozen(given: nn.Module | int, flags: object, trained: tuple[bool, ...]) -> bool:
    norm = _module(given)
    vectors: list[Any] = [getattr(norm, vector, None) for vector in VECTORS]
    if not all(isinstance(v, Tensor) and v.dim() == 1 and len(v) == len(vectors[0]) for v in vectors):
        return False
    if not eps_of(norm) >= 0:
        return False
    # Where it is exported, on the meta device or under vmap there are no values; those of the trial are put there.
    values = all(has_values(vector) for vector in vectors)
    others = list(_others(norm))
    now, before = _Tried((flags, trained, _kinds(norm)), _versions(others)), _frozen.get(norm)
    if before is not None and before.flags == now.flags:
        known = not values or before.tensors == now.tensors
        if known or before.tensors == _versions([*others, *vectors]):
            return True
    if any(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in others):
        return False  # it would be trained, and a BN has no such thing
    with apart(), vectors[0].device if values else torch.device("cpu"):
        of_its_class = acts_frozen(norm, any_vectors(len(vectors[0]), eps_of(norm)), trained)
        frozen = acts_frozen(norm, vectors, trained, alone=not of_its_class) if values else of_its_class
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

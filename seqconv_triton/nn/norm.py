"""Everything about BNs: which modules may hold one, what a stage reads from them, how their statistics move.

A stage computes its BNs itself: what stands in its `norm` and `reduce_norm` holds affine and statistics, one column a
channel, and its own forward is only called where somebody watches it (`watched.py`). It may be a BatchNorm or a
SyncBatchNorm with the forward that PyTorch gave it, a frozen BN by whomever, or what `fuse` leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from seqconv_triton.backend.contract import Norms, NormVectors, StatisticsMode
from seqconv_triton.backend.ranks import Known, batch_norm, group_name
from seqconv_triton.nn.computed import make_weights
from seqconv_triton.nn.frozen import is_frozen
from seqconv_triton.nn.frozen_trial import VECTORS, eps_of
from seqconv_triton.nn.leaf import leaf


class Affine(nn.Module):
    """scale·x + shift for every channel: what is left of a BN whose statistics are folded in (`fuse`)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        return scale_and_shift(x, self.weight, self.bias)


# Statistics of all ranks that BNs, by id, need not ask for: a stage has, and other ranks may have no hooks to call.
_known: ContextVar[dict[int, Known]] = ContextVar("known", default={})  # noqa: B039 # nobody writes into it


@contextmanager
def knowing(norm: nn.Module, known: Known | None) -> Iterator[None]:
    """A `Synchronised` takes the statistics of all ranks from `known`, in this thread."""
    token = _known.set(_known.get() if known is None else {**_known.get(), id(norm): known})
    try:
        yield
    finally:
        _known.reset(token)


class Synchronised(_BatchNorm):
    """BN with the training statistics of all ranks, on any device, in one graph under torch.compile.

    Not an nn.SyncBatchNorm, since DistributedDataParallel refuses those on a CPU.
    """

    process_group: ProcessGroup | None = None

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        group = group_name(self.process_group) if self.training else ""
        if not group:
            return super().forward(x)
        known = None if torch.compiler.is_compiling() else _known.get().get(id(self))
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        weight, bias = affine(self, x)
        images = x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, 1)
        out, mean, var, count = batch_norm(images, weight, bias, self.eps, group, known)
        update_running(self, mean, var, count)
        return out.reshape(x.shape)


class Reading(NamedTuple):
    """What a stage takes from one BN; `group` names the process group whose batch it is, empty for this process's."""

    vectors: NormVectors  # mean and var: the running ones, where there are some
    statistics: StatisticsMode
    eps: float
    group: str = ""


class StageNorms(NamedTuple):
    """What a stage takes from both of its BNs."""

    norms: Norms
    statistics: StatisticsMode
    eps: float
    group: str

    @property
    def main(self) -> Reading:
        return Reading(self.norms.main, self.statistics, self.eps, self.group)

    @property
    def inner(self) -> Reading | None:
        inner = self.norms.inner
        return None if inner is None else Reading(inner, self.statistics, self.eps, self.group)


def read(name: str, norm: nn.Module, like: Tensor) -> Reading:
    """The BN in a module; without an affine it is that of ones and zeros, on the device and in the dtype of `like`.

    Raises TypeError, with the name, for a module that is no BN, ValueError for a BN with a mean or a variance alone or
    without its parameters yet, and where running statistics would need a gradient.
    """
    if isinstance(norm, Affine):
        return Reading(NormVectors(norm.weight, norm.bias), "folded", 0.0)
    if not isinstance(norm, nn.Module):
        raise TypeError(_no_batch_norm(name, norm))
    if not is_batch_norm(norm):
        if not is_frozen(norm):
            raise TypeError(_no_batch_norm(name, norm))
        _refuse_gradients(name, norm)
        return Reading(NormVectors(*(getattr(norm, vector) for vector in VECTORS)), "running", eps_of(norm))
    assert isinstance(norm, _BatchNorm)
    if isinstance(norm, LazyModuleMixin) and norm.has_uninitialized_params():
        raise ValueError(f"{name} is a {type(norm).__name__} that does not know its channels yet: use nn.BatchNorm2d")
    make_weights(norm)
    mean, var = norm.running_mean, norm.running_var
    if (mean is None) != (var is None):
        raise ValueError(f"{name} has running_mean or running_var alone; it needs both, or neither")
    ranks: Any = norm  # any SyncBatchNorm has a process_group
    group = group_name(ranks.process_group) if norm.training and hasattr(norm, "process_group") else ""
    mode: StatisticsMode = "batch" if norm.training or mean is None else "running"
    if mode == "running":
        _refuse_gradients(name, norm)
    return Reading(NormVectors(*affine(norm, like), mean, var), mode, norm.eps, group)


def _refuse_gradients(name: str, norm: nn.Module) -> None:
    for vector in VECTORS[2:] if torch.is_grad_enabled() else ():
        if getattr(norm, vector).requires_grad:
            raise ValueError(f"{name}.{vector} requires a gradient, and statistics get none: requires_grad_(False)")


def read_both(norm: nn.Module, reduce_norm: nn.Module | None, like: Tensor) -> StageNorms:
    """The BNs of a stage. Raises as `read` does, and where the two do not go together."""
    main, mode, eps, group = read("norm", norm, like)
    if reduce_norm is None:
        return StageNorms(Norms(main, None), mode, eps, group)
    inner, inner_mode, inner_eps, inner_group = read("reduce_norm", reduce_norm, like)
    if (mode == "folded") != (inner_mode == "folded"):
        raise TypeError("norm and reduce_norm must both be folded (seqconv_triton.fuse), or neither")
    if mode != inner_mode:
        raise ValueError("norm and reduce_norm must both be in training or both in evaluation mode")
    if eps != inner_eps:
        raise ValueError(f"norm.eps ({eps}) and reduce_norm.eps ({inner_eps}) must be equal")
    if mode == "batch" and group != inner_group:
        raise ValueError("norm and reduce_norm must take their statistics over the same ranks (convert_sync_batchnorm)")
    return StageNorms(Norms(main, inner), mode, eps, group)


# As they are now: somebody may put another in their place.
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, Synchronised.forward)


def is_batch_norm(norm: nn.Module) -> bool:
    """A BatchNorm that computes as PyTorch's does: subclasses with a forward of their own may do anything."""
    forward: Any = type(norm).forward
    return isinstance(norm, _BatchNorm) and any(forward is one for one in _FORWARDS)


def _no_batch_norm(name: str, norm: object) -> str:
    kind = type(norm).__name__
    what = "computes otherwise than BatchNorm2d does" if isinstance(norm, _BatchNorm) else "is no BN"
    return (
        f"{name} is a {kind}, which {what}: a stage computes the BNs of all its groups itself, from a BatchNorm2d, a "
        "SyncBatchNorm, or a frozen BN with weight, bias, running_mean, running_var and eps. For another normalisation "
        "write the layer with plain convs, as seqconv_triton/backend/reference.py does"
    )


def affine(norm: _BatchNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias, ones and zeros where there is none."""
    weight, bias = norm.weight, norm.bias  # read once: parametrizations compute them
    ones = like.new_ones(norm.num_features) if weight is None else weight
    return ones, like.new_zeros(norm.num_features) if bias is None else bias


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x [N, C, H, W], in its dtype."""
    return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


def normalise(x: Tensor, bn: Reading, channels: slice = slice(None), known: Known | None = None) -> Tensor:
    """Some channels of a BN applied to x [N, channels, H, W], with gradients through their batch statistics.

    `known` holds those of all ranks, where this rank alone computes it.
    """
    weight, bias, mean, var = (None if vector is None else vector[channels] for vector in bn.vectors)
    assert weight is not None and bias is not None
    if bn.statistics == "folded":
        return scale_and_shift(x, weight, bias)
    if bn.statistics == "running":
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, bn.eps)
    if bn.group:
        return batch_norm(x, weight, bias, bn.eps, bn.group, known)[0]
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, bn.eps)


@torch.no_grad()
def update_running(norm: nn.Module | None, mean: Tensor | None, var: Tensor | None, count: int | Tensor) -> None:
    """Move the running statistics by a batch's, mean and biased variance over `count` values, as BatchNorm does."""
    if not isinstance(norm, _BatchNorm) or not (norm.training and norm.track_running_stats):
        return
    momentum: float | Tensor = 0.0 if norm.momentum is None else float(norm.momentum)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average
            momentum = norm.num_batches_tracked.double().reciprocal()
    if norm.running_mean is not None and norm.running_var is not None and mean is not None and var is not None:
        unbiased = var * (count / (count - 1))
        for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.lerp_(
                batch.to(running.dtype), momentum if isinstance(momentum, float) else momentum.to(running.dtype)
            )

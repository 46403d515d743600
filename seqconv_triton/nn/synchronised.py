"""BNs whose training statistics are those of all ranks, and `convert_sync_batchnorm`, which makes them."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from seqconv_triton.nn.computed import refuse_computed, refuse_offloaded
from seqconv_triton.nn.norm import Synchronised
from seqconv_triton.nn.watched import has_other_forward

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNorm1d(Synchronised, nn.BatchNorm1d): ...


class SyncBatchNorm2d(Synchronised, nn.BatchNorm2d): ...


class SyncBatchNorm3d(Synchronised, nn.BatchNorm3d): ...


class SyncBatchNormNd(Synchronised):
    """In the place of nn.SyncBatchNorm, for inputs of any dimension as there."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")


TWINS: dict[type[nn.Module], type[Synchronised]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNormNd,
}
TWINS |= {twin: twin for twin in TWINS.values()}


def convert_sync_batchnorm(module: Model, process_group: ProcessGroup | None = None) -> Model:
    """Make every BN inside `module` take its training statistics over all ranks of `process_group` (None: all ranks).

    Works on the module in place, and returns it: its BNs become others, of the same parameters, state dict keys and
    hooks. As for PyTorch's own, convert before wrapping in DistributedDataParallel, and the group must exist in every
    rank.

    A subclass of nn.SyncBatchNorm stays as it is, with its own group.

    Raises, with nothing converted: TypeError for anything but a module, and for a BN of a class of its own (timm's
    BatchNormAct2d, a frozen BN whose train() does nothing), whose ways would be lost; ValueError for a BN with weights
    that are computed (parametrizations, pruning), offloaded by accelerate, or not there yet (lazy modules).
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, not {type(module).__name__}")
    refuse_offloaded(module, "be synchronised")
    norms = {
        norm: name
        for name, norm in module.named_modules()
        if isinstance(norm, _BatchNorm) and (type(norm) in TWINS or not isinstance(norm, nn.SyncBatchNorm))
    }
    for norm, name in norms.items():
        _check_convertible(name or "module", norm)
    # The very same modules otherwise: who holds one of them, its tensors or a hook's handle goes on with it.
    for norm in norms:
        norm.__dict__.pop("forward", None)
        norm.__class__ = TWINS[type(norm)]
        norm.process_group = process_group  # type: ignore[assignment]
    return module


def _check_convertible(name: str, norm: _BatchNorm) -> None:
    kind = type(norm).__name__
    if isinstance(norm, LazyModuleMixin) and norm.has_uninitialized_params():
        raise ValueError(f"{name} is a {kind} whose features are not known yet; call the model once first")
    refuse_computed(name, norm, "be synchronised")
    if type(norm) not in TWINS or has_other_forward(norm):
        raise TypeError(
            f"{name} is a {kind} with ways of its own, which a synchronised BN would not have; convert it first with "
            "the library that it is from (timm.layers.convert_sync_batchnorm), or convert the other modules alone"
        )

"""BNs whose training statistics are those of all ranks, and `convert_sync_batchnorm`, which makes them."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from seqconv_triton.nn.computed import refuse_computed
from seqconv_triton.nn.norm import Synchronised, is_batch_norm

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNorm1d(Synchronised, nn.BatchNorm1d): ...


class SyncBatchNorm2d(Synchronised, nn.BatchNorm2d): ...


class SyncBatchNorm3d(Synchronised, nn.BatchNorm3d): ...


def convert_sync_batchnorm(module: Model, process_group: ProcessGroup | None = None) -> Model:
    """Make every BN inside `module` take its training statistics over all ranks of `process_group` (None: all ranks).

    Works on the module in place, and returns it: its BNs become others, of the same parameters, state dict keys and
    hooks. As for PyTorch's own, convert before wrapping in DistributedDataParallel, and the group must exist in every
    rank.

    A subclass of nn.SyncBatchNorm with a forward of its own stays as it is, with its own group.

    Raises, with nothing converted: TypeError for anything but a module, and for a BN whose class has a forward of its
    own (timm's BatchNormAct2d, whose activation would be lost); ValueError for a BN with weights that are computed
    (parametrizations, pruning) or not there yet (lazy modules).
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, not {type(module).__name__}")
    norms = {norm: name for name, norm in module.named_modules() if isinstance(norm, _BatchNorm)}
    norms = {
        norm: name for norm, name in norms.items() if is_batch_norm(norm) or not isinstance(norm, nn.SyncBatchNorm)
    }
    for norm, name in norms.items():
        _check_convertible(name or "module", norm)
    for norm in norms:
        _convert(norm, process_group)
    return module


def _check_convertible(name: str, norm: _BatchNorm) -> None:
    kind = type(norm).__name__
    if not is_batch_norm(norm) or "forward" in norm.__dict__:
        raise TypeError(
            f"{name} is a {kind} with a forward of its own, which a synchronised BN would not have; convert it first "
            "with the library that it is from (timm.layers.convert_sync_batchnorm), or convert the other modules alone"
        )
    if isinstance(norm, LazyModuleMixin) and norm.has_uninitialized_params():
        raise ValueError(f"{name} is a {kind} whose features are not known yet; call the model once first")
    refuse_computed(name, norm, "be synchronised")


def _convert(norm: _BatchNorm, process_group: ProcessGroup | None) -> None:
    """Another class, and the very same module otherwise: an optimizer or hook that holds its tensors keeps working."""
    twins = ((nn.BatchNorm1d, SyncBatchNorm1d), (nn.BatchNorm3d, SyncBatchNorm3d))
    twin = next((twin for kind, twin in twins if isinstance(norm, kind)), SyncBatchNorm2d)
    norm.__class__ = twin
    norm.process_group = process_group  # type: ignore[assignment]

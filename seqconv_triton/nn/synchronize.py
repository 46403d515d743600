"""`convert_sync_batchnorm`: batch statistics over all ranks of a process group, as under nn.SyncBatchNorm."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from seqconv_triton.backend.ranks import batch_norm, group_name
from seqconv_triton.nn.layers import update_running

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BN with the training statistics of all ranks, on any device, in one graph under torch.compile.

    Not an nn.SyncBatchNorm, since DistributedDataParallel refuses those on a CPU.
    """

    process_group: ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        group = group_name(self.process_group) if self.training else ""
        if not group:
            return super().forward(x)
        out, mean, var, count = batch_norm(x, self.weight, self.bias, self.eps, group)
        update_running(self, mean, var, count)
        return out


def convert_sync_batchnorm(module: Model, process_group: ProcessGroup | None = None) -> Model:
    """Make every BN inside `module` take its training statistics over all ranks of `process_group` (None: all ranks).

    Works on the module in place, and returns it; its parameters and state dict keys stay. As for PyTorch's own,
    convert before wrapping in DistributedDataParallel, and the group must exist in every rank.
    Raises TypeError for anything but a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, not {type(module).__name__}")
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _converted(module, process_group)  # type: ignore[return-value]
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, process_group))
    return module


def _converted(norm: nn.modules.batchnorm._BatchNorm, process_group: ProcessGroup | None) -> SyncBatchNorm2d:
    new = SyncBatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    new.process_group = process_group
    # The very same tensors: an optimizer that holds them keeps working.
    for name, parameter in norm._parameters.items():
        new.register_parameter(name, parameter)
    for name, buffer in norm._buffers.items():
        new.register_buffer(name, buffer)
    return new.train(norm.training)

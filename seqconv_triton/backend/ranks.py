"""Batch statistics over the images of every rank of a process group (synchronised BN).

A group's name goes through the registered ops as text; the empty name means this process alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def process_group(name: str) -> ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def group_name(group: ProcessGroup | None) -> str:
    """The name under which ops know a group (None: all ranks); empty where there is nobody to talk to."""
    if not dist.is_available() or not dist.is_initialized():
        return ""
    group = dist.group.WORLD if group is None else group
    return "" if group is None or group.size() == 1 else group.group_name


class AcrossRanks(NamedTuple):
    """A process group and how many pixels each of its ranks has: float64 [ranks]."""

    group: ProcessGroup
    counts: Tensor

    @classmethod
    def meet(cls, name: str, x: Tensor) -> AcrossRanks:
        """Every rank of the named group tells the others how many pixels x [N, C, H, W] has."""
        group = process_group(name)
        pixels = x.new_full((), x.shape[0] * x.shape[2] * x.shape[3], dtype=torch.float64)
        return cls(group, _gather(pixels, group))

    def statistics(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over all ranks from each rank's own (Chan et al., 1983), in the order of ranks."""
        means, variances = _gather(torch.stack([mean, var]), self.group).unbind(1)
        share = (self.counts / self.counts.sum()).to(mean.dtype)[:, None]
        all_mean = (share * means).sum(0)
        return all_mean, (share * (variances + (means - all_mean).square())).sum(0)

    def means(self, sums: Tensor) -> Tensor:
        """Each rank's sums over its pixels, as means over all pixels; not differentiable."""
        return _gather(sums, self.group).sum(0) / self.counts.sum().to(sums.dtype)


def _gather(local: Tensor, group: ProcessGroup) -> Tensor:
    """[ranks, *local.shape]"""
    gathered = local.new_empty((group.size(), *local.shape))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it
    gather(gathered, local.contiguous()[None], group=group)
    return gathered


@torch.library.custom_op("seqconv_triton::sum_over_ranks", mutates_args=())
def sum_over_ranks(local: Tensor, group: str) -> Tensor:
    """The sum of every rank's tensor, in the order of ranks; an op, so that torch.compile need not look inside."""
    return _gather(local, process_group(group)).sum(0)


@sum_over_ranks.register_fake
def _(local: Tensor, group: str) -> Tensor:
    return torch.empty_like(local)


def _save(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """Every rank's loss depends on every summand."""
    return torch.ops.seqconv_triton.sum_over_ranks(grad, ctx.group), None


sum_over_ranks.register_autograd(_backward, setup_context=_save)


class Known(NamedTuple):
    """Mean and biased variance [C] over all ranks, and how many pixels those have."""

    mean: Tensor
    var: Tensor
    pixels: Tensor


class _AsKnown(torch.autograd.Function):
    """A sum over ranks that is known already: no rank waits for another until its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, known: Tensor, group: str) -> Tensor:
        ctx.group = group
        return known.to(local.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.seqconv_triton.sum_over_ranks(grad, ctx.group), None, None


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: str, known: Known | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """BN of x [N, C, H, W] over all ranks of a group, in plain differentiable PyTorch.

    Returns the output, mean and biased variance, and the number of pixels of all ranks (float64). With `known` a rank
    may compute it that the others do not.
    """

    def total_over(local: Tensor, total: Tensor | None) -> Tensor:
        if total is None:
            summed: Tensor = torch.ops.seqconv_triton.sum_over_ranks(local, group)
            return summed
        return _AsKnown.apply(local, total, group)  # type: ignore[no-untyped-call]

    pixels = x.new_full((), x.shape[0] * x.shape[2] * x.shape[3], dtype=torch.float64)
    count = total_over(pixels, None if known is None else known.pixels)
    total = count.to(weight.dtype)
    precise = x.to(weight.dtype)
    mean = total_over(precise.sum((0, 2, 3)), None if known is None else known.mean * total) / total
    centred = precise - mean[:, None, None]
    var = total_over(centred.square().sum((0, 2, 3)), None if known is None else known.var * total) / total
    scale = weight * (var + eps).rsqrt()
    out = centred * scale[:, None, None] + bias[:, None, None]
    return out.to(x.dtype), mean.detach(), var.detach(), count

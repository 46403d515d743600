"""What both passes of the Triton backend derive from a plan and its images: tables, shapes, BN vectors, rows."""

from __future__ import annotations

from functools import cache, cached_property

import torch
from torch import Tensor

from seqconv_triton.backend.contract import BatchStatistics, NormVectors, StageArguments
from seqconv_triton.backend.packing import empty_channels_last, window_weights
from seqconv_triton.backend.ranks import AcrossRanks
from seqconv_triton.kernels.launch import (
    BIAS,
    D_BIAS,
    D_WEIGHT,
    FORWARD_ROWS,
    MEAN,
    SCALE,
    SHIFT,
    VAR,
    WEIGHT,
    A,
    B,
    C,
    ConvShape,
    Readers,
)
from seqconv_triton.plan import Plan
from seqconv_triton.plan_text import decode, encode


@cache
def tables(encoded: str, pinned: bool) -> tuple[Readers, Readers, Readers]:
    """The convs over windows, the 3×3 convs inside groups, and the tail, as the kernels read them; on the host.

    Never dropped: a captured CUDA graph copies from this memory in every replay.
    """
    plan = decode(encoded)
    k, area = plan.group_width, 1 if plan.bottleneck else 9
    windows = [
        (group.window_start, group.window_width, offset * k * area, offset)
        for group, offset in zip(plan.groups, plan.window_offsets[:-1], strict=True)
    ]
    inside = [(0, k, j * k * (k // plan.subgroups) * 9, 0) for j in range(len(plan.groups))]
    read = plan.read_channels
    repeats = plan.tail.repeats if plan.tail is not None else 1
    tail = [(-r * read, read * repeats, 0, plan.window_offsets[-1] - r * read) for r in range(repeats)]
    found = [Readers.table(rows) for rows in (windows, inside, tail)]
    return tuple(Readers(r.rows.pin_memory() if pinned else r.rows, r.align) for r in found)  # type: ignore[return-value]


def taps_first(weight: Tensor, plan: Plan, windows: bool) -> Tensor:
    """3×3 weights as the kernels read them, [C_out, taps, C_in]; free where they are channels-last already."""
    if not windows or plan.uniform:
        return weight.permute(0, 2, 3, 1).contiguous()
    return torch.cat([w.permute(0, 2, 3, 1).reshape(-1) for w in window_weights(weight, plan, 3)])


def taps_last_(into: Tensor, gradient: Tensor, plan: Plan, windows: bool) -> None:
    """The inverse of `taps_first`, from a flat gradient into a packed one."""
    if not windows or plan.uniform:
        into.copy_(gradient.view(into.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2))
        return
    start = 0
    for w in window_weights(into, plan, 3):
        piece = gradient[start : start + w.numel()]
        w.copy_(piece.view(w.shape[0], 3, 3, w.shape[1]).permute(0, 3, 1, 2))
        start += w.numel()


def taps_first_view(weight: Tensor, plan: Plan) -> Tensor:
    """`taps_first` in the packed shape of the weight, for slicing into groups; its order is [C_out, taps, C_in]."""
    return taps_first(weight, plan, windows=not plan.bottleneck).reshape(weight.shape)


class Geometry:
    """What forward and backward both derive from a plan and its images."""

    def __init__(self, plan: Plan, images: Tensor) -> None:
        self.plan, self.device = plan, images.device
        self.batch, _, self.height, self.width = images.shape
        self.pixels = self.batch * self.height * self.width
        k = plan.group_width
        sub = k // plan.subgroups
        size = (self.batch, self.height, self.width)
        self.inside = ConvShape(*size, 3, 1, k, sub, sub, k)
        kernel = 1 if plan.bottleneck else 3
        widths = {layer.in_channels for layer in plan.layers if layer.windowed or plan.uniform}
        self.windows = [
            ConvShape(*size, kernel, 1, k, width, k, width, own_width=width not in widths)
            for width in (group.window_width for group in plan.groups)
        ]
        self.tail = None
        if plan.tail is not None:
            t = plan.tail
            inputs = plan.read_channels * t.repeats // t.groups
            self.tail = ConvShape(
                *size, t.kernel_size, t.stride, t.out_channels, inputs, t.out_channels // t.groups, plan.read_channels
            )

    @cached_property
    def tables(self) -> tuple[Readers, Readers, Readers]:
        """`tables` on the device, copied anew each time and never kept.

        A tensor that outlives the pass would be foreign to the memory pool of a CUDA graph being warmed up.
        """
        found = tables(encode(self.plan), self.device.type == "cuda")
        return tuple(Readers(r.rows.to(self.device, non_blocking=True), r.align) for r in found)  # type: ignore[return-value]


def rows(x: Tensor) -> Tensor:
    """A channels-last [N, C, H, W] tensor as [P, C], without a copy."""
    flat = x.permute(0, 2, 3, 1)
    return flat.as_strided((flat.shape[0] * flat.shape[1] * flat.shape[2], x.shape[1]), (flat.stride(2), 1))


def channels_last(x: Tensor) -> Tensor:
    """x with rows of channels, as the kernels address it, whatever its layout."""
    _, c, h, w = x.shape
    return x if x.stride() == (h * w * c, 1, w * c, c) else empty_channels_last(x, c, h, w).copy_(x)


def slots(x: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """The columns of every group's slot, one view a group: made at one stroke, which costs a fifth of slicing each."""
    return x[:, plan.in_channels :].split(plan.group_width, 1)


class Norms:
    """The BNs of a stage as the kernels take them: float32 vectors, one column a channel (`launch.py` names the rows).

    `main` has a column for every buffer channel, `inner` for those behind the 1×1 convs (None in basic layers).
    Columns of an already activated input are never used.
    """

    def __init__(self, stage: StageArguments, known: bool, rows: int = FORWARD_ROWS) -> None:
        self.offset = stage.plan.total_channels - stage.plan.normalized_channels
        main, inner = stage.norms
        self.main = _vectors(main, stage.eps, known, rows, self.offset)
        self.inner = None if inner is None else _vectors(inner, stage.eps, known, rows, 0)

    def store(self, statistics: BatchStatistics) -> None:
        """Hand the batch's statistics out."""
        statistics.mean.copy_(self.main[MEAN, self.offset :])
        statistics.var.copy_(self.main[VAR, self.offset :])
        if self.inner is not None:
            assert statistics.inner_mean is not None and statistics.inner_var is not None
            statistics.inner_mean.copy_(self.inner[MEAN])
            statistics.inner_var.copy_(self.inner[VAR])


def _vectors(norm: NormVectors, eps: float, known: bool, rows: int, offset: int) -> Tensor:
    weight, bias, mean, var = norm
    vectors = weight.new_empty((rows, offset + weight.shape[0]), dtype=torch.float32)
    own = vectors[:, offset:]
    own[WEIGHT], own[BIAS] = weight, bias
    if known and mean is not None and var is not None:
        own[MEAN], own[VAR] = mean, var
        torch.mul(weight, (var + eps).rsqrt(), out=own[SCALE])
        torch.sub(bias, own[SCALE] * mean, out=own[SHIFT])
    elif known:  # folded
        own[MEAN], own[VAR], own[SCALE], own[SHIFT] = 0, 1, weight, bias
    return vectors


def share_statistics(norm: Tensor, across: AcrossRanks | None, eps: float) -> None:
    """Replace this rank's batch statistics in a BN's vectors by those of all ranks."""
    if across is not None:
        norm[MEAN], norm[VAR] = across.statistics(norm[MEAN], norm[VAR])
        torch.mul(norm[WEIGHT], (norm[VAR] + eps).rsqrt(), out=norm[SCALE])
        torch.sub(norm[BIAS], norm[SCALE] * norm[MEAN], out=norm[SHIFT])


def share_gradients(norm: Tensor, across: AcrossRanks | None, eps: float) -> None:
    """Make BN's backward dx = a·g + b·x + c that of all ranks; the affine's gradients stay this rank's own."""
    if across is not None:
        mean_gx, mean_g = across.means(norm[D_WEIGHT : D_BIAS + 1])
        torch.mul(norm[A] * -mean_gx, (norm[VAR] + eps).rsqrt(), out=norm[B])
        torch.sub(norm[A] * -mean_g, norm[B] * norm[MEAN], out=norm[C])

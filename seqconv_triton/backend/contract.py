"""What every backend computes: a stage (a single layer is a stage of one layer without a tail), in packed tensors.

P = N·H·W pixels, J groups of k channels, B = plan.total_channels buffer channels. `reference` is plain differentiable
PyTorch, the specification. A `FusedBackend` is two functions, which `ops/registered.py` puts behind one op a direction.
It allocates what it returns, with the sizes, strides and dtypes of `empty_outputs`, `empty_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from seqconv_triton.backend.ranks import AcrossRanks
from seqconv_triton.plan import Plan

# Where BN's mean and variance come from: this batch, `NormVectors`, or nowhere, where `fuse` has left a scale and a
# shift in weight and bias.
StatisticsMode = Literal["batch", "running", "folded"]


class Convs(NamedTuple):
    """The packed conv weights of a stage."""

    reduce: Tensor | None  # [J·k, C], flat where windows differ; None in basic layers
    transform: Tensor  # [J·k, k/s, 3, 3]; basic: [J·k, C, 3, 3], flat where windows differ
    tail: Tensor | None  # [plan.out_channels, …, kernel, kernel]; None without a tail


class NormVectors(NamedTuple):
    """BNs of channels side by side: the affine, and mean and biased variance where the mode asks for them.

    In mode "running" they are there, in "batch" only in the backward pass, where they are the forward pass's.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None


class Norms(NamedTuple):
    """The BNs behind the buffer's channels, and those behind the 1×1 convs, which basic layers do not have."""

    main: NormVectors  # [plan.normalized_channels]
    inner: NormVectors | None  # [J·k]


class StageArguments(NamedTuple):
    """What stays the same from a stage's forward pass to its backward pass."""

    plan: Plan
    convs: Convs
    norms: Norms
    statistics: StatisticsMode = "batch"
    eps: float = 1e-5
    mask: Tensor | None = None  # [N, plan.mask_channels]
    ranks: AcrossRanks | None = None  # whose batch it is in mode "batch"; None: this process's


class BatchStatistics(NamedTuple):
    """Mean and biased variance of a batch, as in `Norms`."""

    mean: Tensor
    var: Tensor
    inner_mean: Tensor | None
    inner_var: Tensor | None


class ForwardOutputs(NamedTuple):
    """What the forward pass gives: `buffer` if kept, z if kept and there is one, the statistics in mode "batch"."""

    out: Tensor  # [N, plan.out_channels, …]: raw behind the tail, or activated
    buffer: Tensor | None  # [N, B, H, W]: the raw input, and every group's raw output
    z: Tensor | None  # [J, N, H, W, k]: raw outputs of the 1×1 convs
    statistics: BatchStatistics | None


class Needs(NamedTuple):
    """Which gradients are wanted; those of the BNs come with the rest."""

    x: bool
    shortcut: bool
    reduce_weight: bool
    transform_weight: bool
    tail_weight: bool


class Gradients(NamedTuple):
    """Gradients by the names that the registered op's arguments have; None where not wanted, or nothing to derive."""

    x: Tensor | None
    shortcut: Tensor | None
    reduce_weight: Tensor | None
    transform_weight: Tensor | None
    tail_weight: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    reduce_norm_weight: Tensor | None
    reduce_norm_bias: Tensor | None


class ForwardPass(Protocol):
    def __call__(
        self, x: Tensor, shortcut: Tensor | None, stage: StageArguments, *, keep: bool, keep_inner: bool
    ) -> ForwardOutputs:
        """x [N, C, H, W] in any layout; `keep` the buffer, and with `keep_inner` z, for the backward pass."""


class BackwardPass(Protocol):
    def __call__(
        self,
        d_out: Tensor | None,
        d_buffer: Tensor | None,
        buffer: Tensor,
        z: Tensor | None,
        stage: StageArguments,
        needs: Needs,
    ) -> Gradients:
        """From the gradients of out and buffer (one of them may be None). z, where not kept, is computed again."""


class FusedBackend(NamedTuple):
    """A backend with a backward pass of its own; never called without a pixel."""

    forward: ForwardPass
    backward: BackwardPass


class StageOutput(NamedTuple):
    """What a stage gives: `out` behind the tail (raw) or activated, the raw buffer if asked for, batch statistics.

    `counts` holds every rank's number of pixels where the statistics are those of a process group.
    """

    out: Tensor
    buffer: Tensor | None
    statistics: BatchStatistics | None
    counts: Tensor | None = None


def with_statistics(norms: Norms, batch: BatchStatistics) -> Norms:
    """The BNs with a batch's statistics, as the backward pass takes them."""
    main, inner = norms
    if inner is not None:
        inner = inner._replace(mean=batch.inner_mean, var=batch.inner_var)
    return Norms(main._replace(mean=batch.mean, var=batch.var), inner)


def empty_channels_last(
    like: Tensor,
    channels: int,
    height: int,
    width: int,
    empty_strided: Callable[..., Tensor] = Tensor.new_empty_strided,
) -> Tensor:
    """An uninitialised [N, channels, height, width] tensor with channels-last strides, N and dtype as `like`."""
    strides = (height * width * channels, 1, width * channels, channels)
    return empty_strided(like, (like.shape[0], channels, height, width), strides)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are kept in float32, and in float64 for float64 features."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_outputs(
    x: Tensor,
    stage: StageArguments,
    *,
    keep: bool,
    keep_inner: bool,
    empty_strided: Callable[..., Tensor] = Tensor.new_empty_strided,
) -> ForwardOutputs:
    """Uninitialised outputs as every fused backend lays them out: images channels-last, z one group after the other.

    `empty_strided(x, size, stride)` gives the memory for buffer and z.
    """
    plan, (images, _, height, width) = stage.plan, x.shape
    groups, k, statistics = len(plan.groups), plan.group_width, None
    if stage.statistics == "batch":
        counts = [plan.normalized_channels] * 2 + [groups * k] * (2 if plan.bottleneck else 0)
        vectors: list[Tensor | None] = [x.new_empty(count, dtype=statistics_dtype(x.dtype)) for count in counts]
        statistics = BatchStatistics(*vectors, *[None] * (4 - len(vectors)))  # type: ignore[arg-type]
    buffer = z = None
    if keep:
        buffer = empty_channels_last(x, plan.total_channels, height, width, empty_strided)
    if keep_inner and plan.bottleneck:
        strides = (images * height * width * k, height * width * k, width * k, k, 1)
        z = empty_strided(x, (groups, images, height, width, k), strides)
    out = empty_channels_last(x, plan.out_channels, plan.out_size(height), plan.out_size(width))
    return ForwardOutputs(out, buffer, z, statistics)


def empty_gradients(buffer: Tensor, stage: StageArguments, needs: Needs) -> Gradients:
    """Uninitialised gradients as every fused backend lays them out: images channels-last, parameters as they are."""
    plan, convs, (main, inner) = stage.plan, stage.convs, stage.norms
    _, _, height, width = buffer.shape

    def wanted(weight: Tensor | None, needed: bool = True) -> Tensor | None:
        return torch.empty_like(weight) if weight is not None and needed else None

    return Gradients(
        empty_channels_last(buffer, plan.in_channels, height, width) if needs.x else None,
        empty_channels_last(buffer, len(plan.groups) * plan.group_width, height, width) if needs.shortcut else None,
        wanted(convs.reduce, needs.reduce_weight),
        wanted(convs.transform, needs.transform_weight),
        wanted(convs.tail, needs.tail_weight),
        torch.empty_like(main.weight),
        torch.empty_like(main.bias),
        None if inner is None else torch.empty_like(inner.weight),
        None if inner is None else torch.empty_like(inner.bias),
    )

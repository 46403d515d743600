"""What every backend computes: a stage (a single layer is a stage of one layer without a tail), in packed tensors.

P = N·H·W pixels, J groups of k channels, B = plan.total_channels buffer channels. `reference` is plain differentiable
PyTorch, the specification; every other backend has `stage_forward` and `stage_backward`, which `ops/registered.py`
registers as one op each.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StageParameters(NamedTuple):
    """The packed parameters of a stage; the reduce entries are None in basic layers, the tail's without a tail."""

    reduce_weight: Tensor | None  # [J·k, C]; flat where windows differ
    reduce_norm_weight: Tensor | None  # [J·k]
    reduce_norm_bias: Tensor | None  # [J·k]
    transform_weight: Tensor  # [J·k, k/s, 3, 3]; basic: [J·k, C, 3, 3], flat where windows differ
    norm_weight: Tensor  # [plan.normalized_channels]
    norm_bias: Tensor  # [plan.normalized_channels]
    tail_weight: Tensor | None  # [plan.out_channels, …, kernel, kernel]


class Statistics(NamedTuple):
    """Mean and biased variance of every BN of a stage: running ones going in, a batch's coming out."""

    mean: Tensor | None  # [plan.normalized_channels]
    var: Tensor | None
    reduce_mean: Tensor | None  # [J·k]
    reduce_var: Tensor | None


# BN without statistics, as `fuse` leaves it: a channel's weight and bias are its scale and shift.
FOLDED = Statistics(None, None, None, None)


class StageGradients(NamedTuple):
    """Where a backend writes gradients; None where none is wanted. The BNs' come with the rest and are always there."""

    x: Tensor | None
    shortcut: Tensor | None
    parameters: WantedGradients


class WantedGradients(NamedTuple):
    """As StageParameters, but the conv weights' entries may be None."""

    reduce_weight: Tensor | None
    reduce_norm_weight: Tensor | None
    reduce_norm_bias: Tensor | None
    transform_weight: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    tail_weight: Tensor | None


class StageOutput(NamedTuple):
    """What a stage gives: `out` behind the tail (raw) or activated, the raw buffer if asked for, batch statistics.

    `counts` holds every rank's number of pixels where the statistics are those of a process group.
    """

    out: Tensor
    buffer: Tensor | None
    statistics: Statistics | None
    counts: Tensor | None = None

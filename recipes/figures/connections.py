"""How strongly each group of a layer uses each group before it: the numbers behind the paper's Figure 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seqconv_triton.backend.packing import window_weights
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.plan import Plan


@dataclass(frozen=True)
class Connections:
    """`strength` [target groups, source groups]: mean absolute weight, 1 for the layer's strongest connection.

    Masked where the window does not reach. Sources are numbered as in the paper: −1, −2, … are groups of k channels of
    the layer's input, the newest first; 1, 2, … are the layer's own earlier groups. `edges` are the rows at which a new
    layer begins, where several layers of a stage are shown as one; the sources are then counted from the first one.
    """

    strength: np.ma.MaskedArray[tuple[int, int], np.dtype[np.float64]]
    sources: tuple[int, ...]
    edges: tuple[int, ...] = ()


def group_strengths(
    weights: Sequence[Tensor], plan: Plan, first: int, last: int
) -> np.ma.MaskedArray[tuple[int, int], np.dtype[np.float64]]:
    """Mean absolute weight of every connection of groups [first, last), not normalised.

    `weights` are the convs over the windows of all groups of the plan, each [k, window, kernel, kernel]. Row i is group
    first + i. Columns are runs of k buffer channels, aligned with the slot of group `first`: those before it, from the
    first that a window touches on, then the slots of the groups [first, last − 1). A run that a window covers in part
    is the mean over the part. Computed in float64; masked where a window covers nothing of a run.
    """
    k = plan.group_width
    origin = plan.slot(first)
    start = min(group.window_start for group in plan.groups[first:last])
    before = -(-(origin - start) // k)
    total = np.zeros((last - first, before + last - first - 1))
    count = np.zeros_like(total)
    for row, j in enumerate(range(first, last)):
        window = plan.groups[j].window_start + np.arange(plan.groups[j].window_width)
        columns = (window - origin) // k + before
        strengths = weights[j].detach().to("cpu", torch.float64).abs().mean((0, 2, 3)).numpy()
        np.add.at(total[row], columns, strengths)
        np.add.at(count[row], columns, 1)
    return np.ma.MaskedArray(total / np.maximum(count, 1), mask=count == 0)


def layer_connections(part: PackedSeqConv, layer: int) -> Connections:
    """One layer of a stage, its number in the plan given: the window's weights are the 1×1 convs' in bottleneck layers,
    the 3×3 convs' in basic ones. Raises ValueError for weights that are not finite."""
    first, last = layer_groups(part.plan, layer)
    strength = _normalised(group_strengths(_weights(part), part.plan, first, last))
    earlier = last - first - 1
    before = strength.shape[1] - earlier
    return Connections(strength, (*range(-before, 0), *range(1, earlier + 1)))


def stage_connections(part: PackedSeqConv) -> Connections:
    """All layers of a stage in one band: each layer's rows are normalised to that layer's maximum."""
    plan = part.plan
    strength = group_strengths(_weights(part), plan, 0, len(plan.groups))
    edges = []
    for layer in range(len(plan.layers)):
        first, last = layer_groups(plan, layer)
        strength[first:last] = _normalised(strength[first:last])
        edges.append(first)
    before = strength.shape[1] - len(plan.groups) + 1
    return Connections(strength, (*range(-before, 0), *range(1, len(plan.groups))), tuple(edges))


def layer_groups(plan: Plan, layer: int) -> tuple[int, int]:
    """The groups [first, last) of a layer."""
    ends = np.cumsum([layer.out_channels // plan.group_width for layer in plan.layers])
    return int(ends[layer - 1]) if layer else 0, int(ends[layer])


def _weights(part: PackedSeqConv) -> tuple[Tensor, ...]:
    weight = part.reduce_weight if part.plan.bottleneck else part.transform_weight
    assert weight is not None
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weights that are not finite: the training of this network has diverged")
    return window_weights(weight, part.plan, 1 if part.plan.bottleneck else 3)


def _normalised(
    strength: np.ma.MaskedArray[tuple[int, int], np.dtype[np.float64]],
) -> np.ma.MaskedArray[tuple[int, int], np.dtype[np.float64]]:
    """Divided by the maximum; a layer whose weights are all 0, as in a network not trained yet, stays 0."""
    largest = strength.max()
    return strength / largest if largest else strength

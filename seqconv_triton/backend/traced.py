"""The evaluation pass as few plain, functional ops: what torch.export and ONNX exporters see.

BN is folded as in the aten backend's evaluation; windows are concatenations, which a graph of values cannot avoid.
Weights are sliced, never split: ONNX Runtime refuses splits into some thirty parts or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend.contract import StageArguments
from seqconv_triton.backend.folding import folded_groups, scale_and_shift
from seqconv_triton.backend.packing import group_masks, group_transform, group_window
from seqconv_triton.plan import Plan

Step = Callable[[Tensor], Tensor]


class GroupConstants(NamedTuple):
    """A group's convs with what is folded into them, and the BN of a 3×3 conv that keeps its own."""

    reduce: Tensor | None  # [k, window, 1, 1]; None in basic layers
    reduce_shift: Tensor | None  # [k]
    transform: Tensor  # [k, k/s, 3, 3]; basic: [k, window, 3, 3]
    transform_shift: Tensor | None  # [k] where BN is folded in
    scale: Tensor | None  # [k, 1, 1] where it is not
    shift: Tensor | None


class StageConstants(NamedTuple):
    """Everything that an evaluation needs of a stage beside its plan."""

    entry_scale: Tensor | None  # [C, 1, 1]; None for an activated input
    entry_shift: Tensor | None
    groups: tuple[GroupConstants, ...]
    tail: Tensor | None


def constants(stage: StageArguments, dtype: torch.dtype, added: bool = False) -> StageConstants:
    """Slices of the packed weights, folded; of what `fuse` has folded they are views.

    `added`: a shortcut from outside comes between every 3×3 conv and its BN.
    """
    plan, k, (reduce, transform, tail) = stage.plan, stage.plan.group_width, stage.convs
    done = stage.statistics == "folded"
    foldable = folded_groups(stage, added)
    scale, shift = (vector.to(dtype) for vector in scale_and_shift(stage.norms.main, stage.eps))
    inner = None
    if stage.norms.inner is not None:
        inner = tuple(vector.to(dtype) for vector in scale_and_shift(stage.norms.inner, stage.eps))
    missing = plan.total_channels - plan.normalized_channels  # an activated input has no BN
    entry_scale, entry_shift = (None if missing else v[: plan.in_channels, None, None] for v in (scale, shift))
    groups = []
    for j in range(len(plan.groups)):
        own = slice(plan.slot(j) - missing, plan.slot(j) - missing + k)
        first, first_shift = None, None
        if reduce is not None and inner is not None:
            rows = slice(j * k, (j + 1) * k)
            first, first_shift = group_window(reduce, plan, 1, j), inner[1][rows]
            first = first if done else first * inner[0][rows, None, None, None]
        second = group_transform(transform, plan, j)
        if j in foldable:
            second = second if done else second * scale[own, None, None, None]
            groups.append(GroupConstants(first, first_shift, second, shift[own], None, None))
        else:
            apart = scale[own, None, None], shift[own, None, None]
            groups.append(GroupConstants(first, first_shift, second, None, *apart))
    return StageConstants(entry_scale, entry_shift, tuple(groups), tail)


class Features:
    """Activated features in the order of the buffer: the input, then every group's."""

    def __init__(self, x: Tensor, channels: int) -> None:
        self.parts = [(x, channels)]  # counted, since a torch.fx trace knows no shape

    def append(self, part: Tensor, channels: int) -> None:
        self.parts.append((part, channels))

    def window(self, start: int, count: int) -> Tensor:
        """Channels [start, start + count)."""
        pieces, offset = [], 0
        for part, channels in self.parts:
            first, stop = max(start - offset, 0), min(start + count - offset, channels)
            if first < stop:
                pieces.append(part if stop - first == channels else part[:, first:stop])
            offset += channels
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


class GroupSteps(NamedTuple):
    """What a group does: functions, or modules."""

    reduce: Step | None
    inner_relu: Step
    transform: Step
    scale: Tensor | None
    shift: Tensor | None
    relu: Step


class StageSteps(NamedTuple):
    entry_scale: Tensor | None
    entry_shift: Tensor | None
    entry_relu: Step
    groups: tuple[GroupSteps, ...]
    tail: Step | None


def steps(stage: StageConstants, plan: Plan) -> StageSteps:
    """With PyTorch's functions."""
    relu, tail, tail_conv = torch.relu, plan.tail, None
    subgroups = plan.subgroups if plan.bottleneck else 1

    def conv(weight: Tensor, bias: Tensor | None, stride: int = 1, groups: int = 1) -> Step:
        return lambda x: F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, 1, groups)

    groups = []
    for group in stage.groups:
        reduce = None if group.reduce is None else conv(group.reduce, group.reduce_shift)
        transform = conv(group.transform, group.transform_shift, 1, subgroups)
        groups.append(GroupSteps(reduce, relu, transform, group.scale, group.shift, relu))
    if tail is not None and stage.tail is not None:
        tail_conv = conv(stage.tail, None, tail.stride, tail.groups)
    return StageSteps(stage.entry_scale, stage.entry_shift, relu, tuple(groups), tail_conv)


def evaluate(x: Tensor, shortcut: Tensor | None, stage: StageArguments) -> Tensor:
    """What `ops.stage` gives with known statistics."""
    folded = constants(stage, x.dtype, shortcut is not None)
    return walk(x, shortcut, stage.plan, steps(folded, stage.plan), stage.mask).out


class Walked(NamedTuple):
    """A stage's output, and by the way what else there is."""

    out: Tensor
    features: Features
    raw: list[Tensor]  # of the groups whose BN is not folded in


def walk(x: Tensor, shortcut: Tensor | None, plan: Plan, stage: StageSteps, mask: Tensor | None = None) -> Walked:
    k = plan.group_width
    raw = []
    masks = None if mask is None else group_masks(mask.to(x.dtype), plan)
    awaited = {group.residual_start for group in plan.groups}
    sources = {c: x[:, c : c + k] for c in awaited if c is not None and c < plan.in_channels}
    activated = x
    if stage.entry_scale is not None and stage.entry_shift is not None:
        activated = stage.entry_relu(x * stage.entry_scale + stage.entry_shift)
    features = Features(activated, plan.in_channels)
    for j, (group, does) in enumerate(zip(plan.groups, stage.groups, strict=True)):
        seen = features.window(group.window_start, group.window_width)
        if masks is not None:
            seen = seen * masks[j][:, :, None, None]
        if does.reduce is not None:
            seen = does.inner_relu(does.reduce(seen))
        y = does.transform(seen)
        if does.scale is not None and does.shift is not None:
            if shortcut is not None:
                y = y + shortcut[:, j * k : (j + 1) * k]
            elif group.residual_start is not None:
                y = y + sources[group.residual_start]
            sources[plan.slot(j)] = y
            raw.append(y)
            y = y * does.scale + does.shift
        features.append(does.relu(y), k)
    out = features.window(plan.total_channels - plan.read_channels, plan.read_channels)
    if plan.tail is None or stage.tail is None:
        return Walked(out, features, raw)
    if masks is not None:
        out = out * masks[-1][:, :, None, None]
    out = torch.cat([out] * plan.tail.repeats, 1) if plan.tail.repeats > 1 else out
    return Walked(stage.tail(out), features, raw)

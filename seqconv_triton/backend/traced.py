"""The evaluation pass as few plain, functional ops: what torch.export and ONNX exporters see.

BN is folded as in the aten backend's evaluation; windows are concatenations, which a graph of values cannot avoid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend.contract import StageArguments
from seqconv_triton.backend.folding import Folding
from seqconv_triton.backend.packing import group_masks


class Features:
    """Activated features in the order of the buffer: the input, then every group's."""

    def __init__(self, x: Tensor, k: int) -> None:
        self.x, self.k = x, k
        self.outputs: list[Tensor] = []

    def window(self, start: int, count: int) -> Tensor:
        """Channels [start, start + count); the paper's windows begin and end between two groups."""
        channels = self.x.shape[1]
        first, stop = start - channels, start + count - channels  # as the outputs count
        pieces = [output for i, output in enumerate(self.outputs) if first <= i * self.k < stop]
        if first < 0:
            pieces.insert(0, self.x if start == 0 and stop >= 0 else self.x[:, start : start + count])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def evaluate(x: Tensor, shortcut: Tensor | None, stage: StageArguments) -> Tensor:
    """What `ops.stage` gives with known statistics."""
    plan, mask = stage.plan, stage.mask
    k = plan.group_width
    folding = Folding(stage, x.dtype, shortcut is not None)
    missing = plan.total_channels - plan.normalized_channels
    sizes = [plan.in_channels] + [k] * len(plan.groups)
    scales, shifts = (v[:, None, None].split(sizes) for v in (folding.scale, folding.shift))
    masks = None if mask is None else group_masks(mask.to(x.dtype), plan)
    awaited = {group.residual_start for group in plan.groups}
    sources = {c: x[:, c : c + k] for c in awaited if c is not None and c < plan.in_channels}
    features = Features(x if missing else torch.relu(x * scales[0] + shifts[0]), k)
    subgroups = plan.subgroups if plan.bottleneck else 1
    for j, group in enumerate(plan.groups):
        seen = features.window(group.window_start, group.window_width)
        if masks is not None:
            seen = seen * masks[j][:, :, None, None]
        convs = folding.group(j)
        if convs.reduce is not None:
            seen = torch.relu(F.conv2d(seen, convs.reduce[:, :, None, None], convs.reduce_shift))
        y = F.conv2d(seen, convs.transform, convs.transform_shift, 1, 1, 1, subgroups)
        if convs.transform_shift is None:
            if shortcut is not None:
                y = y + shortcut[:, j * k : (j + 1) * k]
            elif group.residual_start is not None:
                y = y + sources[group.residual_start]
            sources[plan.slot(j)] = y
            y = y * scales[j + 1] + shifts[j + 1]
        features.outputs.append(torch.relu(y))
    out = features.window(plan.total_channels - plan.read_channels, plan.read_channels)
    if plan.tail is None:
        return out
    if masks is not None:
        out = out * masks[-1][:, :, None, None]
    assert stage.convs.tail is not None
    tail = plan.tail
    out = torch.cat([out] * tail.repeats, 1) if tail.repeats > 1 else out
    return F.conv2d(out, stage.convs.tail, None, tail.stride, tail.kernel_size // 2, 1, tail.groups)

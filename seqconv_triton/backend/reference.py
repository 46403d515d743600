"""The specification: the paper's equations in plain PyTorch, one concatenation a group, differentiable by autograd.

x_0 is a layer's activated input, x_i the activated output of its group i, raw_i the same before BN-ReLU.

    SeqConv (dense, Eq. 2):   raw_i = F_i([x_0, x_1, …, x_(i-1)])
    WSeqConv (windowed):      F_i sees only the last C channels of that concatenation
    (W)SeqConvB (bottleneck): F_i = 3×3 conv ∘ ReLU ∘ BN ∘ 1×1 conv; otherwise F_i is one 3×3 conv
    residual block:           layer B adds the block's raw input, channel for channel, to its raw_i
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend import ranks as across_ranks
from seqconv_triton.backend.contract import BatchStatistics, Convs, NormVectors, StageArguments, StageOutput
from seqconv_triton.backend.packing import group_masks, transform_weights, window_weights
from seqconv_triton.plan import Layer, Plan


class Norm:
    """The packed BNs of a stage, handed out in order; batch statistics are noted down.

    With the name of a process group they are those of all its ranks.
    """

    def __init__(self, vectors: NormVectors, stage: StageArguments, group: str) -> None:
        self.weight, self.bias, self.mean, self.var = vectors
        self.mode, self.eps, self.group = stage.statistics, stage.eps, group
        self.count: Tensor | None = None
        self.start = 0
        self.batch: list[tuple[Tensor, Tensor]] = []

    def activate(self, raw: Tensor) -> Tensor:
        """ReLU(BN(raw)) with the next channels' affine."""
        channels = slice(self.start, self.start + raw.shape[1])
        self.start = channels.stop
        weight, bias = self.weight[channels], self.bias[channels]
        if self.mode == "running":
            assert self.mean is not None and self.var is not None
            return F.relu(
                F.batch_norm(raw, self.mean[channels], self.var[channels], weight, bias, False, 0.0, self.eps)
            )
        if self.mode == "folded":
            scale, shift = weight.to(raw.dtype), bias.to(raw.dtype)
            return F.relu(raw * scale[:, None, None] + shift[:, None, None])
        if self.group:
            out, mean, var, self.count = across_ranks.batch_norm(raw, weight, bias, self.eps, self.group)
        elif raw.shape[0] == 0:  # no statistics, and gradients of zero
            out = (raw * weight[:, None, None] + bias[:, None, None]).to(raw.dtype)
            mean, var = torch.zeros_like(bias), torch.ones_like(bias)
        else:
            out, mean, inverse = torch.native_batch_norm(raw, weight, bias, None, None, True, 0.0, self.eps)
            var = (inverse.detach().pow(-2) - self.eps).clamp_min(0)
        self.batch.append((mean.detach(), var))
        return F.relu(out)

    def statistics(self) -> tuple[Tensor, Tensor]:
        return torch.cat([mean for mean, _ in self.batch]), torch.cat([var for _, var in self.batch])


class Groups:
    """The weights of a stage's groups, in order."""

    def __init__(self, convs: Convs, plan: Plan, mask: Tensor | None) -> None:
        self.reduce: Iterator[Tensor] = iter(() if convs.reduce is None else window_weights(convs.reduce, plan, 1))
        self.transform = iter(transform_weights(convs.transform, plan))
        self.mask: Iterator[Tensor] = iter(() if mask is None else group_masks(mask, plan))
        self.subgroups = plan.subgroups if plan.bottleneck else 1


def last_channels(features: list[Tensor], count: int) -> Tensor:
    """The last `count` channels of the concatenation of `features`."""
    window: list[Tensor] = []
    for feature in reversed(features):
        if count <= 0:
            break
        window.insert(0, feature[:, -count:])
        count -= feature.shape[1]
    return window[0] if len(window) == 1 else torch.cat(window, 1)


def seqconv(
    x: Tensor, shortcut: Tensor | None, layer: Layer, k: int, groups: Groups, norm: Norm, inner: Norm | None
) -> tuple[Tensor, Tensor]:
    """One (W)SeqConv(B) layer on an activated x: its raw and its activated output."""
    features, raws = [x], []
    for i in range(layer.out_channels // k):
        seen = last_channels(features, layer.in_channels if layer.windowed else layer.in_channels + i * k)
        mask = next(groups.mask, None)
        if mask is not None:
            seen = seen * mask[:, :, None, None]
        if inner is not None:
            seen = inner.activate(F.conv2d(seen, next(groups.reduce)))
        raw = F.conv2d(seen, next(groups.transform), padding=1, groups=groups.subgroups)
        if shortcut is not None:
            raw = raw + shortcut[:, i * k : (i + 1) * k]
        raws.append(raw)
        features.append(norm.activate(raw))
    return torch.cat(raws, 1), torch.cat(features[1:], 1)


def stage(x: Tensor, shortcut: Tensor | None, arguments: StageArguments, keep_buffer: bool, group: str) -> StageOutput:
    """All layers of a stage, then its tail; with the name of a process group, a batch is that of all its ranks."""
    plan, convs, norms = arguments.plan, arguments.convs, arguments.norms
    norm = Norm(norms.main, arguments, group)
    inner = None if norms.inner is None else Norm(norms.inner, arguments, group)
    mask = None if arguments.mask is None else arguments.mask.to(x.dtype)
    groups = Groups(convs, plan, mask)

    raw, activated = x, norm.activate(x) if plan.raw_input else x
    block_input = shortcut if shortcut is not None else raw
    raws, outputs = [x], [activated]
    for layer in plan.layers:
        added = shortcut if shortcut is not None else block_input if layer.residual else None
        block_input = raw
        raw, activated = seqconv(activated, added, layer, plan.group_width, groups, norm, inner)
        raws.append(raw)
        outputs.append(activated)

    out = last_channels(outputs, plan.read_channels)
    if plan.tail is not None and convs.tail is not None:
        tail_mask = next(groups.mask, None)
        if tail_mask is not None:
            out = out * tail_mask[:, :, None, None]
        out = torch.cat([out] * plan.tail.repeats, 1) if plan.tail.repeats > 1 else out
        padding = plan.tail.kernel_size // 2
        out = F.conv2d(out, convs.tail, None, plan.tail.stride, padding, 1, plan.tail.groups)
    batch = None
    if arguments.statistics == "batch":
        batch = BatchStatistics(*norm.statistics(), *((None, None) if inner is None else inner.statistics()))
    return StageOutput(out, torch.cat(raws, 1) if keep_buffer else None, batch, norm.count)

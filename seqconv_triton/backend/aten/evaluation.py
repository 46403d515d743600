"""The aten backend's evaluation pass: BN folded into weights and biases once, a few images at a time.

Only activations are stored, where they stay in the cache; raw features live from where they are written until a layer
B adds them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqconv_triton.backend.aten.packed import packed, packed_convolution
from seqconv_triton.backend.aten.parts import Images, convolution, onednn_takes, pixels, pointwise
from seqconv_triton.backend.aten.ring import placed, placed_masks
from seqconv_triton.backend.aten.tail import End
from seqconv_triton.backend.aten.windows import Ring, Strips, windows
from seqconv_triton.backend.contract import StageArguments
from seqconv_triton.backend.folding import Folding, GroupWeights
from seqconv_triton.plan import Plan

# More than this leaves the last-level cache, and glibc gives blocks above 32 MiB back to the system each time.
CHUNK_BYTES = 16 * 2**20


def reduced(weights: GroupWeights, window: Tensor, images: Images) -> Tensor:
    """1×1 conv and ReLU on rows [P, columns]: [P, k]."""
    assert weights.reduce is not None
    if weights.packed:
        return pixels(packed_convolution(images(window), weights.reduce, weights.reduce_shift, 0, 1).relu_())
    return pointwise(window, weights.reduce, weights.reduce_shift, images).relu_()


def transformed(weights: GroupWeights, x: Tensor, subgroups: int) -> Tensor:
    """3×3 conv."""
    if weights.packed:
        return packed_convolution(x, weights.transform, weights.transform_shift, 1, subgroups)
    return convolution(x, weights.transform, weights.transform_shift, 1, subgroups)


def images_per_chunk(x: Tensor, plan: Plan) -> int:
    """How many images' activated channels fit into CHUNK_BYTES, in even shares of the batch."""
    strip = plan.ring_channels or max(segment.stop - segment.start for segment in plan.segments)
    fit = max(1, CHUNK_BYTES // (strip * x.shape[2] * x.shape[3] * x.element_size()))
    return -(-x.shape[0] // -(-x.shape[0] // fit))


def evaluate(x: Tensor, shortcut: Tensor | None, stage: StageArguments, out: Tensor) -> None:
    """Fill `out` with known statistics; nothing links the images, so they go through a few at a time."""
    plan, mask = stage.plan, stage.mask
    chunk = images_per_chunk(x, plan)
    folding = Folding(stage, x.dtype, shortcut is not None, placed)
    if folding.done and shortcut is None and onednn_takes(x):
        weights = packed(stage, folding, x[:chunk])
    elif chunk < x.shape[0]:
        weights = [folding.group(j) for j in range(len(plan.groups))].__getitem__
    else:
        weights = folding.group
    kept = None
    for start in range(0, x.shape[0], chunk):
        own = slice(start, start + chunk)
        own_shortcut, own_mask = (None if t is None else t[own] for t in (shortcut, mask))
        kept = windows(plan, pixels(x[own]), kept)
        _evaluate_chunk(x[own], own_shortcut, folding, weights, stage.convs.tail, own_mask, plan, out[own], kept)


def _evaluate_chunk(
    x: Tensor,
    shortcut: Tensor | None,
    folding: Folding,
    weights: Callable[[int], GroupWeights],
    tail_weight: Tensor | None,
    mask: Tensor | None,
    plan: Plan,
    out: Tensor,
    kept: Ring | Strips,
) -> None:
    k, groups, width = plan.group_width, plan.groups, plan.in_channels
    images, rows = Images(x), pixels(x)
    masks = None if mask is None else placed_masks(mask.to(x.dtype), plan)
    awaited = {group.residual_start for group in groups}
    sources = {c: rows[:, c : c + k] for c in awaited if c is not None and c < width}
    subgroups = plan.subgroups if plan.bottleneck else 1
    end = End(plan, images, tail_weight, None if masks is None else masks[-1])
    for own, into in kept.input_pieces():
        if plan.raw_input:
            torch.addcmul(folding.shift[own], rows[:, own], folding.scale[own], out=into)
            into.clamp_min_(0)
        else:
            into.copy_(rows[:, own])
    for j, group in enumerate(groups):
        c = plan.slot(j)
        if c in end.parts:
            end.leave(c, kept.newest(end.width(c)), out)
        window = kept.window(j)
        if masks is not None:
            window = window * images.pixel_mask(masks[j])
        convs = weights(j)
        if convs.reduce is not None:
            window = reduced(convs, window, images)
        y = transformed(convs, images(window), subgroups)
        slot = kept.slot(j)
        if convs.transform_shift is None:
            if shortcut is not None:
                y += shortcut[:, j * k : (j + 1) * k]
            elif group.residual_start is not None:
                y += images(sources.pop(group.residual_start))
            if c in awaited:
                sources[c] = pixels(y)
            raw = pixels(y)
            torch.addcmul(folding.shift[c : c + k], raw, folding.scale[c : c + k], out=slot)
            slot.clamp_min_(0)
        else:
            torch.clamp_min(pixels(y), 0, out=slot)
    last = plan.total_channels
    end.leave(last, kept.newest(end.width(last)), out)

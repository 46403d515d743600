"""The aten backend's evaluation pass: BN folded into weights and biases once, a few images at a time.

Only activations are stored, where they stay in the cache; raw features live from where they are written until a layer
B adds them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqconv_triton.backend.aten.output import Output
from seqconv_triton.backend.aten.packed import packed, packed_convolution
from seqconv_triton.backend.aten.parts import Images, Shortcuts, convolution, onednn_takes, pixels, pointwise
from seqconv_triton.backend.aten.ring import Features, ring_of
from seqconv_triton.backend.contract import StageArguments
from seqconv_triton.backend.folding import Folding, GroupWeights

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


def images_per_chunk(x: Tensor, channels: int) -> int:
    """How many images' activated channels fit into CHUNK_BYTES, in even shares of the batch."""
    fit = max(1, CHUNK_BYTES // (channels * x.shape[2] * x.shape[3] * x.element_size()))
    return -(-x.shape[0] // -(-x.shape[0] // fit))


def evaluate(x: Tensor, shortcut: Tensor | None, stage: StageArguments, out: Tensor) -> None:
    """Fill `out` with known statistics; nothing links the images, so they go through a few at a time."""
    ring = ring_of(stage.plan)
    chunk = images_per_chunk(x, ring.channels)
    folding = Folding(stage, x.dtype, shortcut is not None, ring.place)
    if folding.done and shortcut is None and onednn_takes(x):
        weights = packed(stage, folding, x[:chunk])
    elif chunk < x.shape[0]:
        weights = [folding.group(j) for j in range(len(stage.plan.groups))].__getitem__
    else:
        weights = folding.group
    features = None
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        images = pixels(x[part])
        # Fresh memory costs a page fault every 4 KiB.
        if features is None or features.rows.shape[0] != images.shape[0]:
            features = Features(ring, images)
        features.clear()
        part_shortcut, part_mask = (None if t is None else t[part] for t in (shortcut, stage.mask))
        _evaluate_chunk(x[part], part_shortcut, stage._replace(mask=part_mask), folding, weights, features, out[part])


def _evaluate_chunk(
    x: Tensor,
    shortcut: Tensor | None,
    stage: StageArguments,
    folding: Folding,
    weights: Callable[[int], GroupWeights],
    features: Features,
    out: Tensor,
) -> None:
    plan, k, rows, images, ring = stage.plan, stage.plan.group_width, pixels(x), Images(x), features.ring
    masks = None if stage.mask is None else ring.place_masks(stage.mask.to(x.dtype))
    shortcuts = Shortcuts(plan, rows, shortcut)
    subgroups = plan.subgroups if plan.bottleneck else 1
    leaving = Output(ring, images, stage.convs.tail, masks)
    for part, into in features.input_pieces():
        if plan.raw_input:
            torch.addcmul(folding.shift[part], rows[:, part], folding.scale[part], out=into)
            into.clamp_min_(0)
        else:
            into.copy_(rows[:, part])
    for j in range(len(plan.groups)):
        c = plan.slot(j)
        leaving.write(c, features, out)
        window = features.window(j)
        if masks is not None:
            window = window * images.pixel_mask(masks[j])
        convs = weights(j)
        if convs.reduce is not None:
            window = reduced(convs, window, images)
        y, slot = transformed(convs, images(window), subgroups), features.slot(j)
        if convs.transform_shift is None:
            shortcuts.pass_on(j, y, images)
            torch.addcmul(folding.shift[c : c + k], pixels(y), folding.scale[c : c + k], out=slot)
            slot.clamp_min_(0)
        else:
            torch.clamp_min(pixels(y), 0, out=slot)
    leaving.write(plan.total_channels, features, out)

"""The aten backend's evaluation pass: BN folded into weights and biases once, a few images at a time.

Only activations are stored, where they stay in the cache; raw features live from where they are written until a layer
B adds them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend import StageParameters, Statistics
from seqconv_triton.backend.aten_parts import (
    Images,
    convolution,
    norms,
    pixels,
    pointwise,
    tail_convolution,
    window_rows,
)
from seqconv_triton.backend.aten_windows import turned, turned_masks, windows
from seqconv_triton.backend.packing import transform_weights
from seqconv_triton.plan import Plan

# More than this leaves the last-level cache, and glibc gives blocks above 32 MiB back to the system each time.
CHUNK_BYTES = 16 * 2**20


class Folded(NamedTuple):
    """A stage's weights with BN folded in where nothing lies between conv and BN."""

    scale: Tensor  # [buffer channels], also of an already activated input, where it is not used
    shift: Tensor
    reduce: tuple[Tensor, ...]  # [k, window] each
    reduce_shift: tuple[Tensor, ...]  # [k] each
    transform: tuple[Tensor, ...]
    transform_shift: tuple[Tensor | None, ...]  # None: the raw output is needed, BN follows on its own


def fold(
    parameters: StageParameters, statistics: Statistics, plan: Plan, eps: float, dtype: torch.dtype, added: bool
) -> Folded:
    """Fold once for all images; `added`: a shortcut from outside comes between every 3×3 conv and its BN."""
    k = plan.group_width
    done = statistics.mean is None  # by `fuse`
    norm, reduce_norm = norms(parameters, statistics, eps, batch=False)
    scale, shift = (vector.to(dtype) for vector in norm.fold())
    missing = plan.total_channels - plan.normalized_channels
    if missing:
        scale, shift = (F.pad(vector, (missing, 0)) for vector in (scale, shift))
    reduce: tuple[Tensor, ...] = ()
    reduce_shift: tuple[Tensor, ...] = ()
    if reduce_norm is not None:
        reduce_scale, shifts = (vector.to(dtype).split(k) for vector in reduce_norm.fold())
        reduce = window_rows(parameters.reduce_weight, plan)
        if not done:
            reduce = tuple(weight * own[:, None] for weight, own in zip(reduce, reduce_scale, strict=True))
        reduce_shift = tuple(shifts)
    transform = list(transform_weights(parameters.transform_weight, plan))
    transform_shift: list[Tensor | None] = [None] * len(transform)
    # `fuse` leaves room for the shortcut that a single layer may be given.
    for j in () if added or (done and plan.is_single_layer) else plan.foldable_groups:
        own = slice(plan.slot(j), plan.slot(j) + k)
        if not done:
            transform[j] = transform[j] * scale[own, None, None, None]
        transform_shift[j] = shift[own]
    return Folded(scale, shift, reduce, reduce_shift, tuple(transform), tuple(transform_shift))


def images_per_chunk(x: Tensor, plan: Plan) -> int:
    """How many images' activated channels fit into CHUNK_BYTES, in even shares of the batch."""
    strip = plan.in_channels if plan.slides else max(segment.stop - segment.start for segment in plan.segments)
    fit = max(1, CHUNK_BYTES // (strip * x.shape[2] * x.shape[3] * x.element_size()))
    return -(-x.shape[0] // -(-x.shape[0] // fit))


def evaluate(
    x: Tensor,
    shortcut: Tensor | None,
    parameters: StageParameters,
    statistics: Statistics,
    mask: Tensor | None,
    plan: Plan,
    eps: float,
    out: Tensor,
) -> None:
    """Fill `out` with running statistics; nothing links the images, so they go through a few at a time."""
    folded = fold(parameters, statistics, plan, eps, x.dtype, shortcut is not None)
    # Exported graphs take the weights as they are; here they are turned as the window lies in memory.
    if plan.bottleneck:
        folded = folded._replace(reduce=turned(folded.reduce, plan))
    else:
        folded = folded._replace(transform=turned(folded.transform, plan))
    chunk = images_per_chunk(x, plan)
    for start in range(0, x.shape[0], chunk):
        own = slice(start, start + chunk)
        own_shortcut, own_mask = (None if t is None else t[own] for t in (shortcut, mask))
        _evaluate_chunk(x[own], own_shortcut, folded, parameters.tail_weight, own_mask, plan, out[own])


def _evaluate_chunk(
    x: Tensor,
    shortcut: Tensor | None,
    folded: Folded,
    tail_weight: Tensor | None,
    mask: Tensor | None,
    plan: Plan,
    out: Tensor,
) -> None:
    k, groups, width = plan.group_width, plan.groups, plan.in_channels
    images, rows = Images(x), pixels(x)
    masks = None if mask is None else turned_masks(mask.to(x.dtype), plan)
    awaited = {group.residual_start for group in groups}
    sources = {c: rows[:, c : c + k] for c in awaited if c is not None and c < width}
    subgroups = plan.subgroups if plan.bottleneck else 1
    kept = windows(plan, rows)
    if plan.raw_input:
        activated = torch.addcmul(folded.shift[:width], rows, folded.scale[:width])
        torch.clamp_min(activated, 0, out=kept.activated_input)
    else:
        kept.activated_input.copy_(rows)
    for j, group in enumerate(groups):
        c = plan.slot(j)
        window = kept.window(j)
        if masks is not None:
            window = window * images.pixel_mask(masks[j])
        if folded.reduce:
            window = pointwise(window, folded.reduce[j], folded.reduce_shift[j], images).relu_()
        bias = folded.transform_shift[j]
        y = convolution(images(window), folded.transform[j], bias, 1, subgroups)
        slot = kept.slot(j)
        if bias is None:
            if shortcut is not None:
                y += shortcut[:, j * k : (j + 1) * k]
            elif group.residual_start is not None:
                y += images(sources.pop(group.residual_start))
            if c in awaited:
                sources[c] = pixels(y)
            raw = pixels(y)
            torch.addcmul(folded.shift[c : c + k], raw, folded.scale[c : c + k], out=slot)
            slot.clamp_min_(0)
        else:
            torch.clamp_min(pixels(y), 0, out=slot)
        kept.written(j)

    end = images(kept.end())
    if plan.tail is None:
        out.copy_(end)
        return
    if masks is not None:
        end = end * masks[-1][:, :, None, None]
    assert tail_weight is not None
    out.copy_(tail_convolution(end, tail_weight, plan.tail))

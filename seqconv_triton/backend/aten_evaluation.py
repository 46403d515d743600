"""The aten backend's evaluation pass: BN folded into weights and biases once, a few images at a time.

Only activations are stored, where they stay in the cache; raw features live from where they are written until a layer
B adds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend import StageParameters, Statistics
from seqconv_triton.backend.aten_packed import packed_convolution, remembered
from seqconv_triton.backend.aten_parts import (
    Images,
    convolution,
    norms,
    pixels,
    pointwise,
    tail_convolution,
    window_rows,
)
from seqconv_triton.backend.aten_ring import placed, placed_masks
from seqconv_triton.backend.aten_windows import Ring, Strips, windows
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
    packed: bool = False  # weights laid out by oneDNN (`aten_packed.py`)

    def hidden(self, j: int, window: Tensor, images: Images) -> Tensor:
        """Group j's 1×1 conv and ReLU on rows [P, columns]."""
        weight, shift = self.reduce[j], self.reduce_shift[j]
        if self.packed:
            return pixels(packed_convolution(images(window), weight, shift, 0, 1, "relu"))
        return pointwise(window, weight, shift, images).relu_()

    def transformed(self, j: int, x: Tensor, subgroups: int) -> Tensor:
        """Group j's 3×3 conv."""
        weight, shift = self.transform[j], self.transform_shift[j]
        if self.packed:
            return packed_convolution(x, weight, shift, 1, subgroups, "none")
        return convolution(x, weight, shift, 1, subgroups)


# (weight, j, plan, scale): group j's weight times its scale, if there is one.
Place = Callable[[Tensor, int, Plan, Tensor | None], Tensor]


def scaled(weight: Tensor, j: int, plan: Plan, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight * scale


def fold(
    parameters: StageParameters,
    statistics: Statistics,
    plan: Plan,
    eps: float,
    dtype: torch.dtype,
    added: bool,
    place: Place = scaled,
) -> Folded:
    """Fold once for all images; `added`: a shortcut from outside comes between every 3×3 conv and its BN.

    `place` gives weights over windows the order in which the caller keeps windows.
    """
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
        scales = [None] * len(reduce_scale) if done else [own[:, None] for own in reduce_scale]
        weights = window_rows(parameters.reduce_weight, plan)
        reduce = tuple(place(weight, j, plan, own) for j, (weight, own) in enumerate(zip(weights, scales, strict=True)))
        reduce_shift = tuple(shifts)
    transform = list(transform_weights(parameters.transform_weight, plan))
    transform_shift: list[Tensor | None] = [None] * len(transform)
    # `fuse` leaves room for the shortcut that a single layer may be given.
    factors: list[Tensor | None] = [None] * len(transform)
    for j in () if added or (done and plan.is_single_layer) else plan.foldable_groups:
        own = slice(plan.slot(j), plan.slot(j) + k)
        factors[j] = None if done else scale[own, None, None, None]
        transform_shift[j] = shift[own]
    over_window = scaled if plan.bottleneck else place
    transform = [over_window(weight, j, plan, factors[j]) for j, weight in enumerate(transform)]
    return Folded(scale, shift, reduce, reduce_shift, tuple(transform), tuple(transform_shift))


def images_per_chunk(x: Tensor, plan: Plan) -> int:
    """How many images' activated channels fit into CHUNK_BYTES, in even shares of the batch."""
    strip = plan.ring_channels or max(segment.stop - segment.start for segment in plan.segments)
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
    chunk = images_per_chunk(x, plan)

    def fold_here() -> Folded:
        return fold(parameters, statistics, plan, eps, x.dtype, shortcut is not None, placed)

    if statistics.mean is None and shortcut is None:
        folded = remembered(parameters, plan, eps, x[:chunk], fold_here)
    else:
        folded = fold_here()
    kept = None
    for start in range(0, x.shape[0], chunk):
        own = slice(start, start + chunk)
        own_shortcut, own_mask = (None if t is None else t[own] for t in (shortcut, mask))
        kept = windows(plan, pixels(x[own]), kept)
        _evaluate_chunk(x[own], own_shortcut, folded, parameters.tail_weight, own_mask, plan, out[own], kept)


def _evaluate_chunk(
    x: Tensor,
    shortcut: Tensor | None,
    folded: Folded,
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
    if plan.raw_input:
        activated = torch.addcmul(folded.shift[:width], rows, folded.scale[:width])
        for own, into in kept.input_pieces():
            torch.clamp_min(activated[:, own], 0, out=into)
    else:
        for own, into in kept.input_pieces():
            into.copy_(rows[:, own])
    for j, group in enumerate(groups):
        c = plan.slot(j)
        window = kept.window(j)
        if masks is not None:
            window = window * images.pixel_mask(masks[j])
        if folded.reduce:
            window = folded.hidden(j, window, images)
        y = folded.transformed(j, images(window), subgroups)
        slot = kept.slot(j)
        if folded.transform_shift[j] is None:
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

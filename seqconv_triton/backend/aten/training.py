"""The shared buffer on PyTorch's own ops: CPU first, and wherever Triton is not.

Forward, group by group: 1×1 conv as one matrix product over a view of the activated strip, BN-ReLU, 3×3 conv, shortcut,
BN-ReLU into the strip. Kept for backward are the raw buffer and z, the raw outputs of the 1×1 convs. Backward walks the
groups in reverse, recomputes activations, and adds each group's gradient onto its window. Activated channels and their
gradients are held a window or a few at a time (`windows.py`), so that they stay in the cache.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from seqconv_triton.backend.aten import memory
from seqconv_triton.backend.aten.evaluation import evaluate
from seqconv_triton.backend.aten.gradients import gradient_windows
from seqconv_triton.backend.aten.parts import Images, convolution, norms, pixels, pointwise
from seqconv_triton.backend.aten.ring import placed, placed_masks, store, store_product
from seqconv_triton.backend.aten.tail import End
from seqconv_triton.backend.aten.windows import windows
from seqconv_triton.backend.contract import (
    ForwardOutputs,
    Gradients,
    Needs,
    StageArguments,
    empty_gradients,
    empty_outputs,
    with_statistics,
)
from seqconv_triton.backend.packing import reduce_matrices, transform_weights

aten = torch.ops.aten


def forward(
    x: Tensor, shortcut: Tensor | None, stage: StageArguments, *, keep: bool, keep_inner: bool
) -> ForwardOutputs:
    """A stage's forward pass (`FusedBackend`); what is kept lies in memory that belongs to the stage's weights."""
    plan, mask, owner = stage.plan, stage.mask, stage.norms.main.weight
    if not keep:
        memory.release(owner)
    outputs = empty_outputs(
        x, stage, keep=keep, keep_inner=keep_inner, empty_strided=partial(memory.empty_strided, owner)
    )
    out, buffer, z, statistics = outputs
    if not keep and statistics is None and x.dtype in (torch.float32, torch.float64):
        # Half precisions keep BN apart: folding would round its scale.
        evaluate(x, shortcut, stage, out)
        return outputs
    if statistics is not None:
        stage = stage._replace(norms=with_statistics(stage.norms, statistics))
    k, groups, width = plan.group_width, plan.groups, plan.in_channels
    images = Images(x)
    norm, reduce_norm = norms(stage)
    offset = plan.total_channels - plan.normalized_channels  # the BN of buffer channel c is number c - offset
    reduce = reduce_matrices(stage.convs.reduce, plan)
    transform = transform_weights(stage.convs.transform, plan)
    masks = None if mask is None else placed_masks(mask.to(x.dtype), plan)
    subgroups = plan.subgroups if plan.bottleneck else 1
    rows = pixels(x)
    raw_rows = None if buffer is None else pixels(buffer)
    if raw_rows is not None:
        raw_rows[:, :width] = rows
    # Raw features that a later layer B adds, by their place in the buffer.
    awaited = {group.residual_start for group in groups}
    sources = {c: rows[:, c : c + k] for c in awaited if c is not None and c < width}

    end = End(plan, images, stage.convs.tail, None if masks is None else masks[-1])
    kept = windows(plan, rows)
    normal = pixels(norm.normalize(x, 0)) if plan.raw_input else rows
    for own, into in kept.input_pieces():
        torch.clamp_min(normal[:, own], 0, out=into) if plan.raw_input else into.copy_(normal[:, own])
    for j, group in enumerate(groups):
        c = plan.slot(j)
        if c in end.parts:
            end.leave(c, kept.newest(end.width(c)), out)
        window = kept.window(j)
        if masks is not None:
            window = window * images.pixel_mask(masks[j])
        if reduce_norm is not None:
            raw_z = pointwise(window, placed(reduce[j], j, plan), None, images)
            if z is not None:
                z[j].view(-1, k).copy_(raw_z)
            window = pixels(reduce_norm.normalize(images(raw_z), j * k).relu_())
        weight = transform[j] if plan.bottleneck else placed(transform[j], j, plan)
        y = convolution(images(window), weight, None, 1, subgroups)
        if shortcut is not None:
            y += shortcut[:, j * k : (j + 1) * k]
        elif group.residual_start is not None:
            y += images(sources.pop(group.residual_start))
        if raw_rows is not None:
            raw_rows[:, c : c + k] = pixels(y)
        if c in awaited:
            sources[c] = pixels(y)
        torch.clamp_min(pixels(norm.normalize(y, c - offset)), 0, out=kept.slot(j))
    last = plan.total_channels
    end.leave(last, kept.newest(end.width(last)), out)
    return outputs


def backward(
    d_out: Tensor | None,
    d_buffer: Tensor | None,
    buffer: Tensor,
    z: Tensor | None,
    stage: StageArguments,
    needs: Needs,
) -> Gradients:
    """A stage's backward pass (`FusedBackend`), from the raw buffer, z and the statistics of the forward pass.

    Without z (gradient checkpointing) each group's is computed again when its turn comes.
    """
    plan, mask = stage.plan, stage.mask
    gradients = wanted = empty_gradients(buffer, stage, needs)
    k, groups, width = plan.group_width, plan.groups, plan.in_channels
    images = Images(buffer)
    norm, reduce_norm = norms(stage)
    offset = plan.total_channels - plan.normalized_channels
    reduce = reduce_matrices(stage.convs.reduce, plan)
    transform = transform_weights(stage.convs.transform, plan)
    d_transform = None if wanted.transform_weight is None else transform_weights(wanted.transform_weight, plan)
    d_reduce = reduce_matrices(wanted.reduce_weight, plan)
    masks = None if mask is None else placed_masks(mask.to(buffer.dtype), plan)
    raw_rows = pixels(buffer)
    d_raw_rows = None if d_buffer is None else pixels(d_buffer)
    # Gradients that reach raw features through shortcuts, by their place in the buffer.
    passed: dict[int, Tensor] = {}
    subgroups = plan.subgroups if plan.bottleneck else 1

    contiguous: dict[int, Tensor] = {}  # raw channels of the ring, without gaps, from activation to BN's backward

    def raw(start: int, stop: int) -> Tensor:
        """Raw buffer channels for BN, which is slow on rows with gaps."""
        return images(raw_rows[:, start:stop].contiguous())

    def activate(start: int, into: Tensor) -> None:
        """Activated channels from `start` on, computed again a group at a time, which stays in the cache."""
        done = 0 if plan.raw_input else min(into.shape[1], max(0, width - start))
        into[:, :done] = raw_rows[:, start : start + done]
        for first in range(done, into.shape[1], k):
            last = min(first + k, into.shape[1])
            own = raw(start + first, start + last)
            torch.clamp_min(pixels(norm.apply(own, start + first - offset)), 0, out=into[:, first:last])
            if plan.ring_channels is not None and into.shape[1] == k and start >= width:
                contiguous[start] = own

    end = End(plan, images, stage.convs.tail, None if masks is None else masks[-1])
    if d_out is None and wanted.tail_weight is not None:
        wanted.tail_weight.zero_()
    kept = gradient_windows(plan, activate, raw_rows, images)

    def from_outside(moment: int) -> Tensor | None:
        """The gradient of what leaves at that moment, the newest channels."""
        if d_out is None or moment not in end.parts:
            return None
        return end.gradient(moment, kept.newest(end.width(moment)), d_out, wanted.tail_weight)

    kept.begin(from_outside(plan.total_channels))
    for j in reversed(range(len(groups))):
        group, c = groups[j], plan.slot(j)
        raw_y = contiguous.pop(c) if c in contiguous else raw(c, c + k)
        dy = norm.backward(images(kept.enter(j)), raw_y, c - offset, wanted.norm_weight, wanted.norm_bias)
        if (outside := from_outside(c)) is not None:
            kept.add_newest(outside)
        if c in passed:
            dy += images(passed.pop(c))
        if d_raw_rows is not None:
            dy += images(d_raw_rows[:, c : c + k])
        if gradients.shortcut is not None:
            gradients.shortcut[:, j * k : (j + 1) * k] = dy
        if group.residual_start is not None:
            passed[group.residual_start] = pixels(dy)

        window, pixel_mask = kept.window(j), None
        if masks is not None:
            pixel_mask = images.pixel_mask(masks[j])
            window = window * pixel_mask
        if reduce_norm is None:
            u = images(window)
        else:
            kept_z = pointwise(window, placed(reduce[j], j, plan), None, images) if z is None else z[j].view(-1, k)
            raw_z = images(kept_z)
            u = reduce_norm.apply(raw_z, j * k).relu_()
        weight = transform[j] if plan.bottleneck else placed(transform[j], j, plan)
        du, dw, _ = aten.convolution_backward(
            dy, u, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], subgroups,
            [True, d_transform is not None, False],
        )  # fmt: skip
        if d_transform is not None:
            d_transform[j].copy_(dw) if plan.bottleneck else store(dw, d_transform[j], j, plan)
        if reduce_norm is None:
            d_window = pixels(du)
        else:
            assert wanted.reduce_norm_weight is not None and wanted.reduce_norm_bias is not None
            grad = aten.threshold_backward.grad_input(du, u, 0, grad_input=du)
            dz = pixels(reduce_norm.backward(grad, raw_z, j * k, wanted.reduce_norm_weight, wanted.reduce_norm_bias))
            if d_reduce:
                store_product(dz, window, d_reduce[j], j, plan, images)
            if pixel_mask is None:
                kept.add_product(j, dz, reduce[j])
                continue
            d_window = dz @ placed(reduce[j], j, plan)
        kept.add(j, d_window if pixel_mask is None else d_window * pixel_mask)

    dx = gradients.x
    through_norm = images(kept.input_gradient(in_front_of_relu=plan.raw_input))
    if plan.raw_input:
        # Also where x needs no gradient: its BN's affine belongs to this stage.
        through_norm = norm.backward(through_norm, raw(0, width), 0, wanted.norm_weight, wanted.norm_bias)
    if dx is None:
        return gradients
    dx.copy_(through_norm)
    for c, dy in passed.items():
        dx[:, c : c + k] += images(dy)
    if d_raw_rows is not None:
        dx += images(d_raw_rows[:, :width])
    return gradients

"""The shared buffer on PyTorch's own ops: CPU first, and wherever Triton is not.

Forward, group by group: 1×1 conv as one matrix product over a view of the activated strip, BN-ReLU, 3×3 conv, shortcut,
BN-ReLU into the strip. Kept for backward are the raw buffer and z, the raw outputs of the 1×1 convs. Backward walks the
groups in reverse, recomputes activations, and adds each group's gradient onto its window. Activated channels and their
gradients are held a window or a few at a time (`aten_windows.py`), so that they stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqconv_triton.backend import StageGradients, StageParameters, Statistics
from seqconv_triton.backend.across_ranks import AcrossRanks
from seqconv_triton.backend.aten_evaluation import evaluate
from seqconv_triton.backend.aten_gradient_windows import Activate, gradient_windows
from seqconv_triton.backend.aten_parts import (
    Images,
    convolution,
    norms,
    pixels,
    pointwise,
    tail_convolution,
    window_rows,
)
from seqconv_triton.backend.aten_windows import store_turned, turned_masks, turned_weights, windows
from seqconv_triton.backend.packing import transform_weights
from seqconv_triton.plan import Plan

aten = torch.ops.aten


def stage_forward(
    x: Tensor,
    shortcut: Tensor | None,
    parameters: StageParameters,
    statistics: Statistics,
    batch_statistics: bool,
    mask: Tensor | None,
    plan: Plan,
    eps: float,
    out: Tensor,
    buffer: Tensor | None,
    z: Tensor | None,
    across: AcrossRanks | None = None,
) -> None:
    """Fill `out`; `buffer` [N, B, H, W] and `z` [J, N, H, W, k] if given; `statistics` where they are the batch's."""
    if buffer is None and not batch_statistics and x.dtype in (torch.float32, torch.float64):
        # Half precisions keep BN apart: folding would round its scale.
        evaluate(x, shortcut, parameters, statistics, mask, plan, eps, out)
        return
    k, groups, width = plan.group_width, plan.groups, plan.in_channels
    images = Images(x)
    norm, reduce_norm = norms(parameters, statistics, eps, batch_statistics, across)
    offset = plan.total_channels - plan.normalized_channels  # the BN of buffer channel c is number c - offset
    reduce, transform = turned_weights(parameters, plan)
    masks = None if mask is None else turned_masks(mask.to(x.dtype), plan)
    subgroups = plan.subgroups if plan.bottleneck else 1
    rows = pixels(x)
    raw_rows = None if buffer is None else pixels(buffer)
    if raw_rows is not None:
        raw_rows[:, :width] = rows
    # Raw features that a later layer B adds, by their place in the buffer.
    awaited = {group.residual_start for group in groups}
    sources = {c: rows[:, c : c + k] for c in awaited if c is not None and c < width}

    kept = windows(plan, rows)
    if plan.raw_input:
        torch.clamp_min(pixels(norm.normalize(x, 0)), 0, out=kept.activated_input)
    else:
        kept.activated_input.copy_(rows)
    for j, group in enumerate(groups):
        c = plan.slot(j)
        window = kept.window(j)
        if masks is not None:
            window = window * images.pixel_mask(masks[j])
        if reduce_norm is not None:
            raw_z = pointwise(window, reduce[j], None, images)
            if z is not None:
                z[j].view(-1, k).copy_(raw_z)
            window = pixels(reduce_norm.normalize(images(raw_z), j * k).relu_())
        y = convolution(images(window), transform[j], None, 1, subgroups)
        if shortcut is not None:
            y += shortcut[:, j * k : (j + 1) * k]
        elif group.residual_start is not None:
            y += images(sources.pop(group.residual_start))
        if raw_rows is not None:
            raw_rows[:, c : c + k] = pixels(y)
        if c in awaited:
            sources[c] = pixels(y)
        torch.clamp_min(pixels(norm.normalize(y, c - offset)), 0, out=kept.slot(j))
        kept.written(j)

    end = images(kept.end())
    if plan.tail is None:
        out.copy_(end)
        return
    if masks is not None:
        end = end * masks[-1][:, :, None, None]
    assert parameters.tail_weight is not None
    out.copy_(tail_convolution(end, parameters.tail_weight, plan.tail))


def stage_backward(
    d_out: Tensor | None,
    d_buffer: Tensor | None,
    buffer: Tensor,
    z: Tensor | None,
    parameters: StageParameters,
    statistics: Statistics,
    batch_statistics: bool,
    mask: Tensor | None,
    plan: Plan,
    eps: float,
    gradients: StageGradients,
    across: AcrossRanks | None = None,
) -> None:
    """Fill every gradient that `gradients` asks for, from the raw buffer, z and the statistics of the forward pass.

    Without z (gradient checkpointing) each group's is computed again when its turn comes.
    """
    k, groups, width = plan.group_width, plan.groups, plan.in_channels
    images = Images(buffer)
    norm, reduce_norm = norms(parameters, statistics, eps, batch_statistics, across)
    offset = plan.total_channels - plan.normalized_channels
    reduce, transform = turned_weights(parameters, plan)
    wanted = gradients.parameters
    d_transform = None if wanted.transform_weight is None else transform_weights(wanted.transform_weight, plan)
    d_reduce = window_rows(wanted.reduce_weight, plan)
    masks = None if mask is None else turned_masks(mask.to(buffer.dtype), plan)
    raw_rows = pixels(buffer)
    d_raw_rows = None if d_buffer is None else pixels(d_buffer)
    # Gradients that reach raw features through shortcuts, by their place in the buffer.
    passed: dict[int, Tensor] = {}
    subgroups = plan.subgroups if plan.bottleneck else 1

    def activate(start: int, stop: int, into: Tensor) -> None:
        """Activated channels [start, stop) of the buffer, recomputed from the raw ones."""
        done = 0 if plan.raw_input else min(into.shape[1], max(0, width - start))
        into[:, :done] = raw_rows[:, start : start + done]
        if done < into.shape[1]:
            raw = images(raw_rows[:, start + done : stop].contiguous())  # batch_norm is slow on strided rows
            torch.clamp_min(pixels(norm.apply(raw, start + done - offset)), 0, out=into[:, done:])

    from_outside = None
    if d_out is not None:
        from_outside = d_end(d_out, activate, images, parameters, masks, plan, gradients)
    elif wanted.tail_weight is not None:
        wanted.tail_weight.zero_()
    kept = gradient_windows(plan, activate, raw_rows, images, from_outside)
    for j in reversed(range(len(groups))):
        group, c = groups[j], plan.slot(j)
        raw_y = images(raw_rows[:, c : c + k].contiguous())
        dy = norm.backward(images(kept.enter(j)), raw_y, c - offset, wanted.norm_weight, wanted.norm_bias)
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
            raw_z = images(pointwise(window, reduce[j], None, images) if z is None else z[j].view(-1, k))
            u = reduce_norm.apply(raw_z, j * k).relu_()
        du, dw, _ = aten.convolution_backward(
            dy, u, transform[j], None, [1, 1], [1, 1], [1, 1], False, [0, 0], subgroups,
            [True, d_transform is not None, False],
        )  # fmt: skip
        if d_transform is not None:
            store_turned(dw, d_transform[j], plan, j, over_window=not plan.bottleneck)
        if reduce_norm is None:
            d_window = pixels(du)
        else:
            assert wanted.reduce_norm_weight is not None and wanted.reduce_norm_bias is not None
            grad = aten.threshold_backward(du, u, 0)
            dz = pixels(reduce_norm.backward(grad, raw_z, j * k, wanted.reduce_norm_weight, wanted.reduce_norm_bias))
            if d_reduce:
                store_turned(dz.t() @ window, d_reduce[j], plan, j, over_window=True)
            if pixel_mask is None:
                kept.add_product(j, dz, reduce[j])
                continue
            d_window = dz @ reduce[j]
        kept.add(j, d_window if pixel_mask is None else d_window * pixel_mask)

    activated, d_activated = kept.input_rows()
    dx = gradients.x
    if plan.raw_input:
        # Also where x needs no gradient: its BN's affine belongs to this stage.
        grad = aten.threshold_backward(d_activated, activated, 0)
        raw_x = images(raw_rows[:, :width].contiguous())
        through_norm = norm.backward(images(grad), raw_x, 0, wanted.norm_weight, wanted.norm_bias)
    else:
        through_norm = images(d_activated)
    if dx is None:
        return
    dx.copy_(through_norm)
    for c, dy in passed.items():
        dx[:, c : c + k] += images(dy)
    if d_raw_rows is not None:
        dx += images(d_raw_rows[:, :width])


def d_end(
    d_out: Tensor,
    activate: Activate,
    images: Images,
    parameters: StageParameters,
    masks: tuple[Tensor, ...] | None,
    plan: Plan,
    gradients: StageGradients,
) -> Tensor:
    """Gradient [P, read_channels] of what leaves the buffer, through the tail; writes the tail weight's."""
    tail = plan.tail
    if tail is None:
        return pixels(d_out)
    assert parameters.tail_weight is not None
    wanted = gradients.parameters.tail_weight
    activated = pixels(d_out).new_empty(images.batch * images.height * images.width, plan.read_channels)
    activate(plan.total_channels - plan.read_channels, plan.total_channels, activated)
    end = images(activated)
    if masks is not None:
        end = end * masks[-1][:, :, None, None]
    end = torch.cat([end] * tail.repeats, 1) if tail.repeats > 1 else end
    padding = tail.kernel_size // 2
    d_in, dw, _ = aten.convolution_backward(
        d_out, end, parameters.tail_weight, None, [tail.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], tail.groups,
        [True, wanted is not None, False],
    )  # fmt: skip
    if wanted is not None:
        wanted.copy_(dw)
    if tail.repeats > 1:
        d_in = torch.stack(d_in.chunk(tail.repeats, 1)).sum(0)
    if masks is not None:
        d_in = d_in * masks[-1][:, :, None, None]
    return pixels(d_in)

"""The shared buffer on PyTorch's own ops: CPU first, and wherever Triton is not.

Forward, group by group: 1×1 conv as one matrix product over a view of the activated strip, BN-ReLU, 3×3 conv, shortcut,
BN-ReLU into the strip. Kept for backward are the raw buffer and z, the raw outputs of the 1×1 convs. Backward walks the
groups in reverse, recomputes activations a strip at a time, and adds each group's gradient onto its window.
A strip holds the activated channels (or their gradients) of one `Segment`: small enough to stay in the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend import StageGradients, StageParameters, Statistics
from seqconv_triton.backend.across_ranks import AcrossRanks
from seqconv_triton.backend.aten_evaluation import evaluate
from seqconv_triton.backend.aten_parts import Images, Norm, norms, pixels, tail_convolution, window_rows
from seqconv_triton.backend.packing import group_masks, transform_weights
from seqconv_triton.plan import Plan, Segment

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
    transform = transform_weights(parameters.transform_weight, plan)
    reduce = window_rows(parameters.reduce_weight, plan)
    masks = None if mask is None else group_masks(mask.to(x.dtype), plan)
    rows = pixels(x)
    raw_rows = None if buffer is None else pixels(buffer)
    if raw_rows is not None:
        raw_rows[:, :width] = rows
    # Raw features that a later layer B adds, by their place in the buffer.
    awaited = {group.residual_start for group in groups}
    sources = {c: rows[:, c : c + k] for c in awaited if c is not None and c < width}

    raw_z = rows.new_empty(rows.shape[0], k)
    strip = rows.new_empty(0)
    previous = None
    for segment in plan.segments:
        base = segment.start
        fresh = rows.new_empty(rows.shape[0], segment.stop - base)
        if previous is None:
            fresh[:, :width] = pixels(norm.normalize(x, 0)).relu_() if plan.raw_input else rows
        else:
            overlap = previous.stop - base
            fresh[:, :overlap] = strip[:, base - previous.start :]
        strip, previous = fresh, segment
        for j in range(segment.first, segment.last):
            group, c = groups[j], plan.slot(j)
            window = strip[:, group.window_start - base : group.window_start + group.window_width - base]
            if masks is not None:
                window = window * images.pixel_mask(masks[j])
            if reduce_norm is None:
                u = images(window)
            else:
                raw_z = raw_z if z is None else z[j].view(-1, k)
                torch.mm(window, reduce[j].t(), out=raw_z)
                u = reduce_norm.normalize(images(raw_z), j * k).relu_()
            y = F.conv2d(u, transform[j], None, 1, 1, 1, plan.subgroups if plan.bottleneck else 1)
            if shortcut is not None:
                y += shortcut[:, j * k : (j + 1) * k]
            elif group.residual_start is not None:
                y += images(sources.pop(group.residual_start))
            if raw_rows is not None:
                raw_rows[:, c : c + k] = pixels(y)
            if c in awaited:
                sources[c] = pixels(y)
            torch.clamp_min(pixels(norm.normalize(y, c - offset)), 0, out=strip[:, c - base : c - base + k])

    end = images(strip[:, -plan.read_channels :])
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
    transform = transform_weights(parameters.transform_weight, plan)
    wanted = gradients.parameters
    d_transform = None if wanted.transform_weight is None else transform_weights(wanted.transform_weight, plan)
    reduce, d_reduce = window_rows(parameters.reduce_weight, plan), window_rows(wanted.reduce_weight, plan)
    masks = None if mask is None else group_masks(mask.to(buffer.dtype), plan)
    raw_rows = pixels(buffer)
    d_raw_rows = None if d_buffer is None else pixels(d_buffer)
    # Gradients that reach raw features through shortcuts, by their place in the buffer.
    passed: dict[int, Tensor] = {}
    subgroups = plan.subgroups if plan.bottleneck else 1

    strip = d_strip = raw_rows.new_empty(0)
    later = None
    for segment in reversed(plan.segments):
        base = segment.start
        strip = activated_strip(raw_rows, norm, images, plan, segment)
        fresh = torch.zeros_like(strip)
        if later is None:
            if d_out is not None:
                fresh[:, -plan.read_channels :] = d_end(d_out, strip, images, parameters, masks, plan, gradients)
            elif wanted.tail_weight is not None:
                wanted.tail_weight.zero_()
        else:
            fresh[:, later.start - base :] = d_strip[:, : segment.stop - later.start]
        d_strip, later = fresh, segment
        for j in reversed(range(segment.first, segment.last)):
            group, c = groups[j], plan.slot(j)
            own = slice(c - base, c - base + k)
            raw_y = raw_rows[:, c : c + k].contiguous()
            grad = aten.threshold_backward(d_strip[:, own], strip[:, own], 0)
            dy = norm.backward(images(grad), images(raw_y), c - offset, wanted.norm_weight, wanted.norm_bias)
            if c in passed:
                dy += images(passed.pop(c))
            if d_raw_rows is not None:
                dy += images(d_raw_rows[:, c : c + k])
            if gradients.shortcut is not None:
                gradients.shortcut[:, j * k : (j + 1) * k] = dy
            if group.residual_start is not None:
                passed[group.residual_start] = pixels(dy)

            view = slice(group.window_start - base, group.window_start + group.window_width - base)
            window, pixel_mask = strip[:, view], None
            if masks is not None:
                pixel_mask = images.pixel_mask(masks[j])
                window = window * pixel_mask
            if reduce_norm is None:
                u = images(window)
            else:
                raw_z = images(torch.mm(window, reduce[j].t())) if z is None else z[j].permute(0, 3, 1, 2)
                u = reduce_norm.apply(raw_z, j * k).relu_()
            du, dw, _ = aten.convolution_backward(
                dy, u, transform[j], None, [1, 1], [1, 1], [1, 1], False, [0, 0], subgroups,
                [True, d_transform is not None, False],
            )  # fmt: skip
            if d_transform is not None:
                d_transform[j].copy_(dw)
            if reduce_norm is None:
                d_window = pixels(du)
            else:
                assert wanted.reduce_norm_weight is not None and wanted.reduce_norm_bias is not None
                grad = aten.threshold_backward(du, u, 0)
                dz = pixels(
                    reduce_norm.backward(grad, raw_z, j * k, wanted.reduce_norm_weight, wanted.reduce_norm_bias)
                )
                if d_reduce:
                    torch.mm(dz.t(), window, out=d_reduce[j])
                if pixel_mask is None:
                    d_strip[:, view].addmm_(dz, reduce[j])
                    continue
                d_window = torch.mm(dz, reduce[j])
            d_strip[:, view] += d_window if pixel_mask is None else d_window * pixel_mask

    dx = gradients.x
    if plan.raw_input:
        # Also where x needs no gradient: its BN's affine belongs to this stage.
        grad = aten.threshold_backward(d_strip[:, :width], strip[:, :width], 0)
        raw_x = images(raw_rows[:, :width].contiguous())
        through_norm = norm.backward(images(grad), raw_x, 0, wanted.norm_weight, wanted.norm_bias)
    else:
        through_norm = images(d_strip[:, :width])
    if dx is None:
        return
    dx.copy_(through_norm)
    for c, dy in passed.items():
        dx[:, c : c + k] += images(dy)
    if d_raw_rows is not None:
        dx += images(d_raw_rows[:, :width])


def activated_strip(raw_rows: Tensor, norm: Norm, images: Images, plan: Plan, segment: Segment) -> Tensor:
    """The activated channels of a segment, recomputed from the raw buffer."""
    strip = raw_rows.new_empty(raw_rows.shape[0], segment.stop - segment.start)
    done = 0 if plan.raw_input else max(0, plan.in_channels - segment.start)
    strip[:, :done] = raw_rows[:, segment.start : segment.start + done]
    raw = images(raw_rows[:, segment.start + done : segment.stop].contiguous())  # batch_norm is slow on strided rows
    start = segment.start + done - (plan.total_channels - plan.normalized_channels)
    torch.clamp_min(pixels(norm.apply(raw, start)), 0, out=strip[:, done:])
    return strip


def d_end(
    d_out: Tensor,
    strip: Tensor,
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
    end = images(strip[:, -plan.read_channels :])
    if masks is not None:
        end = end * masks[-1][:, :, None, None]
    end = torch.cat([end] * tail.repeats, 1) if tail.repeats > 1 else end.contiguous(memory_format=torch.channels_last)
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

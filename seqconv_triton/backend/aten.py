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
from seqconv_triton.backend.packing import (
    group_masks,
    transform_weights,
    window_weights,
)
from seqconv_triton.plan import Plan, Segment, Tail

aten = torch.ops.aten
# Strips beyond this leave the last-level cache, and glibc gives blocks above 32 MiB back to the system each time.
STRIP_BYTES = 16 * 2**20


def pixels(x: Tensor) -> Tensor:
    """A channels-last [N, C, H, W] tensor as rows of channels: [P, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class Images:
    """Turns rows of channels [P, C] back into [N, C, H, W] without a copy."""

    def __init__(self, x: Tensor) -> None:
        self.batch, _, self.height, self.width = x.shape

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.batch, self.height, self.width)).permute(0, 3, 1, 2)

    def pixel_mask(self, mask: Tensor) -> Tensor:
        """A channel mask [N, C] repeated for every pixel: [P, C]."""
        return mask[:, None].expand(-1, self.height * self.width, -1).reshape(-1, mask.shape[1])


class Norm:
    """Some consecutive BNs of a stage. Batch statistics are taken and stored, running ones are only applied."""

    def __init__(self, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, batch: bool) -> None:
        self.weight, self.bias, self.mean, self.var, self.eps, self.batch = weight, bias, mean, var, eps, batch

    def fold(self) -> tuple[Tensor, Tensor]:
        """scale and shift with BN(x) = scale·x + shift."""
        scale = self.weight * (self.var + self.eps).rsqrt()
        return scale, self.bias - scale * self.mean

    def normalize(self, raw: Tensor, start: int) -> Tensor:
        """BN of channels [start, …) in the forward pass; in training it takes their statistics."""
        if not self.batch:
            return self.apply(raw, start)
        channels = slice(start, start + raw.shape[1])
        weight, bias = self.weight[channels], self.bias[channels]
        out, mean, inverse = torch.native_batch_norm(raw, weight, bias, None, None, True, 0.0, self.eps)
        self.mean[channels] = mean
        # Running statistics need the variance; the kernel returns 1/√(variance + eps).
        self.var[channels] = (inverse.pow(-2) - self.eps).clamp_min(0)
        return out

    def apply(self, raw: Tensor, start: int) -> Tensor:
        """BN of channels [start, …) with known statistics."""
        channels = slice(start, start + raw.shape[1])
        weight, bias, mean, var = (t[channels] for t in (self.weight, self.bias, self.mean, self.var))
        out: Tensor = torch.native_batch_norm(raw, weight, bias, mean, var, False, 0.0, self.eps)[0]
        return out

    def backward(self, grad: Tensor, raw: Tensor, start: int, d_weight: Tensor, d_bias: Tensor) -> Tensor:
        """Gradient of BN on channels [start, …): writes those of the affine, returns that of raw."""
        channels = slice(start, start + raw.shape[1])
        mean, var, weight = self.mean[channels], self.var[channels], self.weight[channels]
        inverse = (var + self.eps).rsqrt()
        d_raw, d_weight[channels], d_bias[channels] = aten.native_batch_norm_backward(
            grad, raw, weight, mean, var, mean, inverse, self.batch, self.eps, [True, True, True]
        )
        return d_raw


def norms(parameters: StageParameters, statistics: Statistics, eps: float, batch: bool) -> tuple[Norm, Norm | None]:
    """The BNs over the buffer, and those behind the 1×1 convs."""
    norm = Norm(parameters.norm_weight, parameters.norm_bias, statistics.mean, statistics.var, eps, batch)
    if parameters.reduce_norm_weight is None:
        return norm, None
    assert parameters.reduce_norm_bias is not None
    assert statistics.reduce_mean is not None and statistics.reduce_var is not None
    return norm, Norm(
        parameters.reduce_norm_weight,
        parameters.reduce_norm_bias,
        statistics.reduce_mean,
        statistics.reduce_var,
        eps,
        batch,
    )


def tail_convolution(x: Tensor, weight: Tensor, tail: Tail) -> Tensor:
    """The conv behind the stage on its activated input."""
    x = torch.cat([x] * tail.repeats, 1) if tail.repeats > 1 else x
    padding = tail.kernel_size // 2
    return F.conv2d(x, weight, None, tail.stride, padding, 1, tail.groups)


def images_per_chunk(x: Tensor, plan: Plan) -> int:
    """How many images' strips fit into STRIP_BYTES, in even shares of the batch."""
    strip = max(segment.stop - segment.start for segment in plan.segments)
    fit = max(1, STRIP_BYTES // (strip * x.shape[2] * x.shape[3] * x.element_size()))
    return -(-x.shape[0] // -(-x.shape[0] // fit))


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
) -> None:
    """Fill `out`; `buffer` [N, B, H, W] and `z` [J, N, H, W, k] if given; `statistics` where they are the batch's."""
    chunk = images_per_chunk(x, plan)
    if chunk < x.shape[0] and not batch_statistics and buffer is None:
        # Nothing links the images in evaluation: a few at a time stay in the cache.
        for start in range(0, x.shape[0], chunk):
            own = slice(start, start + chunk)
            own_shortcut, own_mask = (None if t is None else t[own] for t in (shortcut, mask))
            stage_forward(
                x[own], own_shortcut, parameters, statistics, False, own_mask, plan, eps, out[own], None, None
            )  # fmt: skip
        return
    k, groups, width = plan.group_width, plan.groups, plan.in_channels
    images = Images(x)
    norm, reduce_norm = norms(parameters, statistics, eps, batch_statistics)
    offset = plan.total_channels - plan.normalized_channels  # the BN of buffer channel c is number c - offset
    transform = transform_weights(parameters.transform_weight, plan)
    reduce: tuple[Tensor, ...] = ()
    reduce_shift: Tensor | None = None
    if parameters.reduce_weight is not None and reduce_norm is not None:
        reduce = window_rows(parameters.reduce_weight, plan)
        if not batch_statistics:
            scale, shift = reduce_norm.fold()
            reduce_scale, reduce_shift = scale.to(x.dtype), shift.to(x.dtype)
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
            elif reduce_shift is not None and z is None:
                own = slice(j * k, (j + 1) * k)
                folded = reduce[j] * reduce_scale[own, None]
                u = images(torch.addmm(reduce_shift[own], window, folded.t(), out=raw_z).relu_())
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
) -> None:
    """Fill every gradient that `gradients` asks for, from the raw buffer, z and the statistics of the forward pass."""
    k, groups, width = plan.group_width, plan.groups, plan.in_channels
    images = Images(buffer)
    norm, reduce_norm = norms(parameters, statistics, eps, batch_statistics)
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
                assert z is not None
                raw_z = z[j].permute(0, 3, 1, 2)
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


def window_rows(weight: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
    """The 1×1 convs of all groups as matrices [k, window]; none in basic layers."""
    return () if weight is None else tuple(w.flatten(1) for w in window_weights(weight, plan, 1))


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

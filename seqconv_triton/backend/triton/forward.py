"""The launch order of the Triton kernels for a stage, forward and backward.

A group is two launches forward (1×1 over the window, 3×3) and two backward (pull, 3×3 transposed); a basic layer's is
one each. Nothing is computed here: every launch works on whole tensors that exist before the loop over the groups.
The raw buffer is channels-last; z, and in backward dz and dy, are group-blocked [J, P, k].
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqconv_triton.backend.contract import (
    ForwardOutputs,
    Gradients,
    Needs,
    StageArguments,
    empty_gradients,
    empty_outputs,
)
from seqconv_triton.backend.packing import empty_channels_last, group_masks, transform_weights, window_weights
from seqconv_triton.backend.triton.gradients import recompute_z, through_tail, to_input, weight_gradients
from seqconv_triton.backend.triton.parts import (
    Geometry,
    Norms,
    channels_last,
    rows,
    share_gradients,
    share_statistics,
    slots,
    taps_first,
    taps_first_view,
)
from seqconv_triton.kernels.convolution import convolution
from seqconv_triton.kernels.data_gradient import Fresh, data_gradient
from seqconv_triton.kernels.elementwise import activate
from seqconv_triton.kernels.launch import BACKWARD_ROWS, D_BIAS, D_WEIGHT, INTERPRETED, SCALE, SHIFT, Features, Scratch
from seqconv_triton.kernels.statistics import input_statistics

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(x: Tensor) -> None:
    """Refuse what the kernels cannot take, before anything is launched."""
    if x.dtype not in DTYPES:
        raise TypeError(f'x is {x.dtype}; the triton backend takes float32, float16 and bfloat16 (use_backend("aten"))')
    if not (x.is_cuda or x.is_meta or INTERPRETED):  # meta: kernels are only listed
        raise ValueError(f"x is on {x.device}; the triton backend needs a GPU (or TRITON_INTERPRET=1, for tests)")


def forward(
    x: Tensor, shortcut: Tensor | None, stage: StageArguments, *, keep: bool, keep_inner: bool
) -> ForwardOutputs:
    """A stage's forward pass (`FusedBackend`)."""
    check(x)
    plan, convs, mask, eps, across = stage.plan, stage.convs, stage.mask, stage.eps, stage.ranks
    outputs = empty_outputs(x, stage, keep=keep, keep_inner=keep_inner)
    out, buffer, z, statistics = outputs
    k, width = plan.group_width, plan.in_channels
    geometry = Geometry(plan, x)
    pixels = geometry.pixels
    if buffer is None:
        buffer = empty_channels_last(x, plan.total_channels, geometry.height, geometry.width)
    buffer[:, :width] = x
    raw = rows(buffer)
    norms = Norms(stage, known=statistics is None)
    source = Features(raw, norms.main[SCALE], norms.main[SHIFT], norms.offset)
    scratch = Scratch.allocate(x, pixels, max(k, width)) if statistics is not None else None
    masks = None if mask is None else group_masks(mask, plan)
    transform = transform_weights(taps_first_view(convs.transform, plan), plan)
    reduce = () if convs.reduce is None else window_weights(convs.reduce, plan, 1)
    inner = None if not plan.bottleneck else x.new_empty((pixels, k)) if z is None else z.view(-1, pixels, k)
    added = None if shortcut is None else rows(channels_last(shortcut))

    own_slots, own_norms = slots(raw, plan), slots(norms.main, plan)
    inner_norms = () if norms.inner is None else norms.inner.split(k, 1)
    inner_scales, inner_shifts = (() if norms.inner is None else norms.inner[row].split(k) for row in (SCALE, SHIFT))
    inner_rows = inner.unbind() if inner is not None and z is not None else ()

    if scratch is not None and plan.raw_input:
        input_statistics(raw[:, :width], norms.main[:, :width], scratch, eps)
        share_statistics(norms.main[:, :width], across, eps)
    for j, group in enumerate(plan.groups):
        given, start, shape = source, group.window_start, geometry.windows[j]
        group_mask = None if masks is None else masks[j]
        if inner is not None:
            own = inner if z is None else inner_rows[j]
            convolution(
                given, start, reduce[j], shape, own, mask=group_mask, norm=inner_norms[j], scratch=scratch, eps=eps
            )  # fmt: skip
            share_statistics(inner_norms[j], across, eps)
            given, start, shape, group_mask = Features(own, inner_scales[j], inner_shifts[j]), 0, geometry.inside, None
        own_shortcut = None
        if added is not None:
            own_shortcut = added[:, j * k : (j + 1) * k]
        elif group.residual_start is not None:
            c = group.residual_start
            own_shortcut = own_slots[(c - width) // k] if c >= width else raw[:, c : c + k]
        convolution(
            given, start, transform[j], shape, own_slots[j], mask=group_mask, shortcut=own_shortcut,
            norm=own_norms[j], scratch=scratch, eps=eps,
        )  # fmt: skip
        share_statistics(own_norms[j], across, eps)

    first = plan.total_channels - plan.read_channels
    if statistics is not None:
        norms.store(statistics)
    if geometry.tail is None:
        activate(raw[:, first:], source.scale[first:], source.shift[first:], rows(out))
        return outputs
    assert convs.tail is not None
    weight = convs.tail.permute(0, 2, 3, 1).contiguous()
    convolution(source, first, weight, geometry.tail, rows(out), mask=None if masks is None else masks[-1])
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

    Without z (gradient checkpointing) that of all groups is computed again first.
    Beside what it is given it holds, at its peak, dy and dz of all groups (2·J·k channels; J·k in basic layers), two
    groups' g, the tail's gradient and the weights' partial sums.
    """
    plan, convs, mask, eps, across = stage.plan, stage.convs, stage.mask, stage.eps, stage.ranks
    batch_statistics = stage.statistics == "batch"
    gradients = empty_gradients(buffer, stage, needs)
    k, width, count = plan.group_width, plan.in_channels, len(plan.groups)
    geometry = Geometry(plan, buffer)
    pixels, raw = geometry.pixels, rows(buffer)
    norms = Norms(stage, known=True, rows=BACKWARD_ROWS)
    windows, inside, _ = geometry.tables
    first = plan.total_channels - plan.read_channels
    upstream = None if d_out is None else rows(channels_last(d_out))
    if upstream is not None and geometry.tail is not None:
        upstream = through_tail(upstream, raw, convs, norms, mask, plan, eps, geometry, gradients)
    elif gradients.tail_weight is not None:
        gradients.tail_weight.zero_()

    # Gradients of every group's raw output and of z; those of z are what the 1×1 convs pull from.
    dy = buffer.new_empty((count, pixels, k))
    dz = buffer.new_empty((count, pixels, k)) if plan.bottleneck else dy
    z_rows = None if z is None else z.view(count, pixels, k)
    if z_rows is None and plan.bottleneck:
        z_rows = recompute_z(raw, convs, norms, mask, plan, eps, geometry)
    own_z = () if z_rows is None else z_rows.unbind()
    own_slots, own_norms = slots(raw, plan), slots(norms.main, plan)
    inner_norms = () if norms.inner is None else norms.inner.split(k, 1)
    behind_activation, behind_inner = (buffer.new_empty((pixels, k)) for _ in range(2))
    scratch = Scratch.allocate(buffer, pixels, max(k, width))
    window_weight = convs.reduce
    if window_weight is None:
        window_weight = taps_first(convs.transform, plan, windows=True)
    transform = taps_first_view(convs.transform, plan)
    d_raw = None if d_buffer is None else rows(channels_last(d_buffer))
    receivers = {group.residual_start: j for j, group in enumerate(plan.groups) if group.residual_start is not None}

    def pull(
        c: int, span: tuple[int, int], into: Tensor, fresh: Fresh | None, own_raw: Tensor | None, norm: Tensor | None
    ) -> None:
        """The gradient of as many buffer channels as `into` has, from c on; through the ReLU of `norm` if given."""
        outside = upstream[:, c - first : c - first + into.shape[1]] if upstream is not None and c >= first else None
        data_gradient(
            dz, window_weight, geometry.windows[0], windows, span, c, into.shape[1], into, eps, windows=True,
            fresh=fresh, mask=mask, upstream=outside, raw=own_raw, norm=norm,
            scratch=None if norm is None else scratch, batch=batch_statistics,
        )  # fmt: skip
        if norm is not None and batch_statistics:
            share_gradients(norm, across, eps)

    fresh = None  # the gradient of the group behind the one that is pulled
    for j in reversed(range(count)):
        c = plan.slot(j)
        # Basic layers read a neighbour's gradient while they write their own.
        g = behind_activation if z_rows is not None or j % 2 else behind_inner
        pull(c, plan.readers[j + 1], g, fresh, own_slots[j], own_norms[j])
        d_own = None if d_raw is None else d_raw[:, c : c + k]
        fresh = Fresh(g, own_slots[j], own_norms[j], d_own, dy[receivers[c]] if c in receivers else None)
        if z_rows is None:
            continue
        data_gradient(
            dy, transform, geometry.inside, inside, (j, j + 1), 0, k, behind_inner, eps, windows=False,
            fresh=fresh, raw=own_z[j], norm=inner_norms[j], scratch=scratch, batch=batch_statistics,
        )  # fmt: skip
        if batch_statistics:
            share_gradients(inner_norms[j], across, eps)
        fresh = Fresh(behind_inner, own_z[j], inner_norms[j])
    to_input(pull, fresh, dy, dz, raw, d_raw, norms, receivers, plan, gradients)

    if gradients.shortcut is not None:
        images = dy.unflatten(1, (geometry.batch, geometry.height, geometry.width))
        gradients.shortcut.copy_(images.permute(1, 0, 4, 2, 3).flatten(1, 2))
    weight_gradients(dy, dz, raw, z_rows, norms, mask, plan, geometry, gradients)
    wanted = gradients
    wanted.norm_weight.copy_(norms.main[D_WEIGHT, norms.offset :])
    wanted.norm_bias.copy_(norms.main[D_BIAS, norms.offset :])
    if norms.inner is not None:
        assert wanted.reduce_norm_weight is not None and wanted.reduce_norm_bias is not None
        wanted.reduce_norm_weight.copy_(norms.inner[D_WEIGHT])
        wanted.reduce_norm_bias.copy_(norms.inner[D_BIAS])
    return gradients

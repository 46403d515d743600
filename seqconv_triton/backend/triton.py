"""The launch order of the Triton kernels for a stage, forward and backward.

Nothing is computed here: every launch works on whole tensors that exist before the loop over the groups. The raw buffer
is channels-last; z, and in backward dz and dy, are group-blocked [J, P, k].
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from seqconv_triton.backend import StageGradients, StageParameters, Statistics
from seqconv_triton.backend.packing import empty_channels_last, group_masks, transform_weights, window_weights
from seqconv_triton.kernels.launch import (
    INTERPRETED,
    ConvShape,
    Features,
    Norm,
    activate,
    apply_gradient,
    combine_gradients,
    combine_statistics,
    convolution,
    data_gradient,
    tile_statistics,
    weight_gradient,
)
from seqconv_triton.plan import Plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(x: Tensor) -> None:
    """Refuse what the kernels cannot take, before anything is launched."""
    if x.dtype not in DTYPES:
        raise TypeError(f'x is {x.dtype}; the triton backend takes float32, float16 and bfloat16 (use_backend("aten"))')
    if not (x.is_cuda or x.is_meta or INTERPRETED):  # meta: kernels are only listed
        raise ValueError(f"x is on {x.device}; the triton backend needs a GPU (or TRITON_INTERPRET=1, for tests)")


@lru_cache(maxsize=256)
def tables(encoded: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (window start, width, weight offset, mask offset) of the windows, the 3×3 convs inside groups, the tail.

    A constant of the plan, copied to the device once.
    """
    plan = Plan.decode(encoded)
    k, area = plan.group_width, 1 if plan.bottleneck else 9
    windows = [
        (group.window_start, group.window_width, offset * k * area, offset)
        for group, offset in zip(plan.groups, plan.window_offsets[:-1], strict=True)
    ]
    inside = [(0, k, j * k * (k // plan.subgroups) * 9, 0) for j in range(len(plan.groups))]
    read = plan.read_channels
    repeats = plan.tail.repeats if plan.tail is not None else 1
    tail = [(-r * read, read * repeats, 0, plan.window_offsets[-1] - r * read) for r in range(repeats)]
    return tuple(torch.tensor(rows, dtype=torch.int64, device=device) for rows in (windows, inside, tail))  # type: ignore[return-value]


def taps_first(weight: Tensor, plan: Plan, windows: bool) -> Tensor:
    """3×3 weights as the kernels read them, [C_out, taps, C_in]; free where they are channels-last already."""
    if not windows or plan.uniform:
        return weight.permute(0, 2, 3, 1).contiguous()
    return torch.cat([w.permute(0, 2, 3, 1).reshape(-1) for w in window_weights(weight, plan, 3)])


def taps_last_(into: Tensor, gradient: Tensor, plan: Plan, windows: bool) -> None:
    """The inverse of `taps_first`, from a flat gradient into a packed one."""
    if not windows or plan.uniform:
        into.copy_(gradient.view(into.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2))
        return
    start = 0
    for w in window_weights(into, plan, 3):
        piece = gradient[start : start + w.numel()]
        w.copy_(piece.view(w.shape[0], 3, 3, w.shape[1]).permute(0, 3, 1, 2))
        start += w.numel()


class Geometry:
    """What forward and backward both derive from a plan and its images."""

    def __init__(self, plan: Plan, images: Tensor) -> None:
        self.batch, _, self.height, self.width = images.shape
        self.pixels = self.batch * self.height * self.width
        self.offset = plan.total_channels - plan.normalized_channels  # channels of an already activated input
        k = plan.group_width
        sub = k // plan.subgroups
        size = (self.batch, self.height, self.width)
        self.inside = ConvShape(*size, 3, 1, k, sub, sub, k)
        self.windows = [
            ConvShape(*size, 1 if plan.bottleneck else 3, 1, k, g.window_width, k, g.window_width) for g in plan.groups
        ]
        self.tail = None
        if plan.tail is not None:
            t = plan.tail
            inputs = plan.read_channels * t.repeats // t.groups
            self.tail = ConvShape(
                *size, t.kernel_size, t.stride, t.out_channels, inputs, t.out_channels // t.groups, plan.read_channels
            )


def rows(x: Tensor) -> Tensor:
    """A channels-last [N, C, H, W] tensor as [P, C], without a copy."""
    flat = x.permute(0, 2, 3, 1)
    return flat.as_strided((flat.shape[0] * flat.shape[1] * flat.shape[2], x.shape[1]), (flat.stride(2), 1))


def folded(norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = norm_weight * (var + eps).rsqrt()
    return scale, norm_bias - scale * mean


class Norms:
    """The BNs of a stage as the launchers take them: of buffer channels, and behind the 1×1 convs."""

    def __init__(
        self, parameters: StageParameters, statistics: Statistics, plan: Plan, eps: float, known: bool
    ) -> None:
        self.offset = plan.total_channels - plan.normalized_channels
        self.k = plan.group_width
        self.main = self._norm(
            parameters.norm_weight, parameters.norm_bias, statistics.mean, statistics.var, eps, known
        )
        self.inner: Norm | None = None
        if parameters.reduce_norm_weight is not None and parameters.reduce_norm_bias is not None:
            assert statistics.reduce_mean is not None and statistics.reduce_var is not None
            self.inner = self._norm(
                parameters.reduce_norm_weight, parameters.reduce_norm_bias,
                statistics.reduce_mean, statistics.reduce_var, eps, known,
            )  # fmt: skip
        # The affine by buffer channel, which begins with an already activated input's (never read).
        self.scale, self.shift = self.main.scale, self.main.shift
        if self.offset:
            self.scale = torch.empty(plan.total_channels, dtype=torch.float32, device=self.main.scale.device)
            self.shift = torch.empty_like(self.scale)
            if known:
                self.scale[self.offset :] = self.main.scale
                self.shift[self.offset :] = self.main.shift
            self.main = self.main._replace(scale=self.scale[self.offset :], shift=self.shift[self.offset :])

    @staticmethod
    def _norm(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, known: bool) -> Norm:
        scale, shift = (
            folded(weight, bias, mean, var, eps) if known else (torch.empty_like(mean), torch.empty_like(mean))
        )
        return Norm(weight, bias, mean, var, scale, shift)

    def of(self, start: int, count: int) -> Norm:
        """The BN of buffer channels [start, start + count)."""
        own = slice(start - self.offset, start - self.offset + count)
        return Norm(*(vector[own] for vector in self.main))

    def behind(self, j: int) -> Norm:
        """The BN behind group j's 1×1 conv."""
        assert self.inner is not None
        return Norm(*(vector[j * self.k : (j + 1) * self.k] for vector in self.inner))


def tile_buffers(like: Tensor, pixels: int, channels: int) -> tuple[Tensor, Tensor]:
    """Room for two sums of every tile of pixels, whatever its size (64 pixels is the smallest)."""
    shape = (-(-pixels // 64), channels)
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.float32)


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
    check(x)
    k, width = plan.group_width, plan.in_channels
    geometry = Geometry(plan, x)
    pixels = geometry.pixels
    if buffer is None:
        buffer = empty_channels_last(x, plan.total_channels, geometry.height, geometry.width)
    buffer[:, :width] = x
    raw = rows(buffer)
    norms = Norms(parameters, statistics, plan, eps, known=not batch_statistics)
    source = Features(raw, norms.scale, norms.shift, geometry.offset)
    tiles = tile_buffers(x, pixels, max(k, width)) if batch_statistics else None
    masks = None if mask is None else group_masks(mask, plan)
    transform = transform_weights(taps_first_view(parameters.transform_weight, plan), plan)
    reduce = () if parameters.reduce_weight is None else window_weights(parameters.reduce_weight, plan, 1)
    inner = None if not plan.bottleneck else x.new_empty((pixels, k)) if z is None else z.view(-1, pixels, k)

    if batch_statistics and plan.raw_input:
        assert tiles is not None
        combine_statistics(tiles, norms.of(0, width), pixels, tile_statistics(raw[:, :width], tiles), eps)
    for j, group in enumerate(plan.groups):
        c = plan.slot(j)
        given, start, weight, shape = source, group.window_start, transform[j], geometry.windows[j]
        group_mask = None if masks is None else masks[j]
        if inner is not None:
            own = inner if z is None else inner[j]
            tile = convolution(given, start, reduce[j], shape, own, mask=group_mask, statistics=tiles)
            norm = norms.behind(j)
            if tiles is not None:
                combine_statistics(tiles, norm, pixels, tile, eps)
            given, start, shape, group_mask = Features(own, norm.scale, norm.shift), 0, geometry.inside, None
        added = None
        if shortcut is not None:
            added = rows(channels_last(shortcut))[:, j * k : (j + 1) * k]
        elif group.residual_start is not None:
            added = raw[:, group.residual_start : group.residual_start + k]
        tile = convolution(
            given, start, weight, shape, raw[:, c : c + k], mask=group_mask, shortcut=added, statistics=tiles
        )
        if tiles is not None:
            combine_statistics(tiles, norms.of(c, k), pixels, tile, eps)

    first = plan.total_channels - plan.read_channels
    if geometry.tail is None:
        activate(raw[:, first:], norms.scale[first:], norms.shift[first:], rows(out))
        return
    assert parameters.tail_weight is not None
    tail_mask = None if masks is None else masks[-1]
    weight = parameters.tail_weight.permute(0, 2, 3, 1).contiguous()
    convolution(source, first, weight, geometry.tail, rows(out), mask=tail_mask)


def taps_first_view(weight: Tensor, plan: Plan) -> Tensor:
    """`taps_first` in the packed shape of the weight, for slicing into groups; its order is [C_out, taps, C_in]."""
    return taps_first(weight, plan, windows=not plan.bottleneck).reshape(weight.shape)


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
    k, width, count = plan.group_width, plan.in_channels, len(plan.groups)
    geometry = Geometry(plan, buffer)
    pixels, raw = geometry.pixels, rows(buffer)
    norms = Norms(parameters, statistics, plan, eps, known=True)
    source = Features(raw, norms.scale, norms.shift, geometry.offset)
    windows, inside, tail = tables(plan.encode(), buffer.device)
    wanted = gradients.parameters
    first = plan.total_channels - plan.read_channels
    upstream = None if d_out is None else rows(channels_last(d_out))

    if d_out is not None and geometry.tail is not None:
        assert parameters.tail_weight is not None
        d_tail = upstream
        assert d_tail is not None
        weight = parameters.tail_weight.permute(0, 2, 3, 1).contiguous()
        upstream = buffer.new_empty((pixels, plan.read_channels))
        data_gradient(
            d_tail, 0, weight, geometry.tail, tail, (0, len(tail)), 0, plan.read_channels, False, upstream, eps,
            mask=mask,
        )  # fmt: skip
        if wanted.tail_weight is not None:
            ends = Features(raw[:, first:], norms.scale[first:], norms.shift[first:], max(0, geometry.offset - first))
            flat = weight_gradient(
                d_tail, 0, ends, 0, 0, geometry.tail, tail[:1], geometry.tail.total_in, False, weight.numel(), mask
            )  # fmt: skip
            taps_last_(wanted.tail_weight, flat, plan, windows=False)
    elif wanted.tail_weight is not None:
        wanted.tail_weight.zero_()

    # Gradients of every group's raw output and of z, group-blocked; those of z are what the 1×1 convs pull from.
    dy = buffer.new_empty((count, pixels, k))
    dz = buffer.new_empty((count, pixels, k)) if plan.bottleneck else dy
    z_rows = None if z is None else z.view(count, pixels, k)
    g = buffer.new_empty((pixels, max(k, width)))
    sums = tile_buffers(buffer, pixels, max(k, width))
    coefficients = buffer.new_empty((3, max(k, width)), dtype=torch.float32)
    window_weight = parameters.reduce_weight
    if window_weight is None:
        window_weight = taps_first(parameters.transform_weight, plan, windows=True)
    transform = taps_first_view(parameters.transform_weight, plan)
    d_raw = None if d_buffer is None else rows(channels_last(d_buffer))
    receivers = {group.residual_start: j for j, group in enumerate(plan.groups) if group.residual_start is not None}
    step = pixels * k

    def pull(c: int, channels: int, norm: Norm | None, into: Tensor) -> int:
        """The gradient of activated buffer channels [c, c + channels), through `norm`'s ReLU."""
        readers = [
            i for i, group in enumerate(plan.groups)
            if group.window_start < c + channels and c < group.window_start + group.window_width
        ]  # fmt: skip
        span = (readers[0], readers[-1] + 1) if readers else (0, 0)
        from_outside = upstream[:, c - first : c - first + channels] if upstream is not None and c >= first else None
        return data_gradient(
            dz, step, window_weight, geometry.windows[0], windows, span, c, channels, True, into, eps, mask=mask,
            upstream=from_outside, norm=norm, raw=None if norm is None else raw[:, c : c + channels],
            sums=None if norm is None else sums,
        )  # fmt: skip

    for j in reversed(range(count)):
        c = plan.slot(j)
        own = slice(c - norms.offset, c - norms.offset + k)
        norm, own_g, terms = norms.of(c, k), g[:, :k], coefficients.view(-1)[: 3 * k].view(3, k)
        tile = pull(c, k, norm, own_g)
        combine_gradients(
            sums, norm, wanted.norm_weight[own], wanted.norm_bias[own], terms, pixels, tile, batch_statistics, eps
        )  # fmt: skip
        passed = dy[receivers[c]] if c in receivers else None
        apply_gradient(
            own_g, raw[:, c : c + k], terms, dy[j], None if d_raw is None else d_raw[:, c : c + k], passed
        )  # fmt: skip
        if z_rows is None:
            continue
        assert wanted.reduce_norm_weight is not None and wanted.reduce_norm_bias is not None
        norm, own = norms.behind(j), slice(j * k, (j + 1) * k)
        tile = data_gradient(
            dy, step, transform, geometry.inside, inside, (j, j + 1), 0, k, False, own_g, eps,
            norm=norm, raw=z_rows[j], sums=sums,
        )  # fmt: skip
        combine_gradients(
            sums, norm, wanted.reduce_norm_weight[own], wanted.reduce_norm_bias[own], terms, pixels, tile,
            batch_statistics, eps,
        )  # fmt: skip
        apply_gradient(own_g, z_rows[j], terms, dz[j])

    if gradients.shortcut is not None:
        images = dy.unflatten(1, (geometry.batch, geometry.height, geometry.width))
        gradients.shortcut.copy_(images.permute(1, 0, 4, 2, 3).flatten(1, 2))
    widest = max(group.window_width for group in plan.groups)
    widest_shape = max(geometry.windows, key=lambda shape: shape.group_in)
    window_gradient = wanted.reduce_weight if plan.bottleneck else wanted.transform_weight
    if window_gradient is not None:
        flat = weight_gradient(
            dz, step, source, 0, 0, widest_shape, windows, widest, True, window_gradient.numel(), mask
        )  # fmt: skip
        if plan.bottleneck:
            window_gradient.copy_(flat.view_as(window_gradient))
        else:
            taps_last_(window_gradient, flat, plan, windows=True)
    if z_rows is not None and wanted.transform_weight is not None:
        assert norms.inner is not None
        behind = Features(z_rows, norms.inner.scale, norms.inner.shift)
        flat = weight_gradient(
            dy, step, behind, step, k, geometry.inside, inside, k, False, wanted.transform_weight.numel()
        )  # fmt: skip
        taps_last_(wanted.transform_weight, flat, plan, windows=False)

    if plan.raw_input:
        norm = norms.of(0, width)
        terms = coefficients.view(-1)[: 3 * width].view(3, width)
        tile = pull(0, width, norm, g[:, :width])
        combine_gradients(
            sums, norm, wanted.norm_weight[:width], wanted.norm_bias[:width], terms, pixels, tile, batch_statistics, eps
        )  # fmt: skip
        if gradients.x is None:
            return
        dx = rows(gradients.x)
        apply_gradient(g[:, :width], raw[:, :width], terms, dx, None if d_raw is None else d_raw[:, :width])
        for c, j in receivers.items():
            if c < width:
                dx[:, c : c + k] += dy[j]
    elif gradients.x is not None:
        dx = rows(gradients.x)
        pull(0, width, None, dx)
        if d_raw is not None:
            dx += d_raw[:, :width]


def channels_last(x: Tensor) -> Tensor:
    """x with rows of channels, as the kernels address it, whatever its layout."""
    _, c, h, w = x.shape
    return x if x.stride() == (h * w * c, 1, w * c, c) else empty_channels_last(x, c, h, w).copy_(x)

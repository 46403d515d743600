"""Backward-data in pull form: a channel's gradient is gathered from every later conv that read it.

g[p, c] = Σ_i mask_i · Σ_taps W_i[:, c − start_i, tap]ᵀ · dy_i[p − tap]  over the readers i whose window holds c; then
the ReLU mask of channel c, and the two sums of BN's backward, which the last program to arrive completes. Written once,
accumulated in float32. The same kernel takes a gradient back through a group's 3×3 conv and through the tail.

The first reader's own gradient is usually FRESH: not yet taken through the BN behind its conv, whose sums the previous
launch has just completed. That happens on load, dy = a·g + b·raw + c [+ upstream] [+ passed], and dy is written along
the way for those who need it later. So BN's backward costs no launch and no pass over memory of its own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.configs import architecture, channel_tile, config_for, pinned
from seqconv_triton.kernels.launch import (
    FAN,
    A,
    ConvShape,
    Readers,
    Scratch,
    aligned,
    alignment,
    cdiv,
    covered,
    precision,
    recorders,
    row_stride,
    run,
    wide,
)
from seqconv_triton.kernels.statistics import finish_gradients


@triton.jit
def gathered(
    reader, dy_ptr, weight_ptr, readers_ptr, mask_ptr,
    fresh_ptr, fresh_raw_ptr, coefficient_ptr, fresh_up_ptr, passed_ptr,
    target, P, H, W, OUT_H, OUT_W, stride_dy, step_dy, stride_mask,
    stride_fresh, stride_fresh_raw, stride_coefficient, stride_fresh_up, stride_passed,
    offs_p, mask_p, offs_n, mask_n, pid_n,
    ROWS: tl.constexpr, GROUP_IN: tl.constexpr, GROUP_OUT: tl.constexpr, RANGE: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, WINDOWS: tl.constexpr, HAS_MASK: tl.constexpr,
    FRESH: tl.constexpr, FRESH_UP: tl.constexpr, PASSED: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What one reader contributes to a tile, in float32."""
    start = aligned(tl.load(readers_ptr + reader * 4).to(tl.int32), ALIGN)
    width = aligned(tl.load(readers_ptr + reader * 4 + 1).to(tl.int32), ALIGN)
    weights = weight_ptr + aligned(tl.load(readers_ptr + reader * 4 + 2), ALIGN)
    source = dy_ptr + tl.cast(reader, tl.int64) * step_dy
    column = target + offs_n - start  # of the tile's channels in the reader's window
    seen = mask_n & (column >= 0) & (column < width)
    image = offs_p // (H * W)
    at_h, at_w = (offs_p // W) % H, offs_p % W
    part = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for tap in range(KERNEL * KERNEL):
        up_h = at_h + KERNEL // 2 - tap // KERNEL
        up_w = at_w + KERNEL // 2 - tap % KERNEL
        out_h, out_w = up_h // STRIDE, up_w // STRIDE
        inside = mask_p & (up_h >= 0) & (up_w >= 0) & (out_h < OUT_H) & (out_w < OUT_W)
        if STRIDE > 1:
            inside = inside & (up_h % STRIDE == 0) & (up_w % STRIDE == 0)
        row = (image * OUT_H + out_h) * OUT_W + out_w
        for k0 in range(0, RANGE, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            if WINDOWS:
                inner = column[None, :] + tl.zeros((BLOCK_K, 1), dtype=tl.int32)
                row_length = width
                held = seen[None, :]
            else:
                lowest = pid_n * BLOCK_N + target - start
                offs_k += (lowest // GROUP_IN) * GROUP_OUT
                inner = column[None, :] - (offs_k // GROUP_OUT)[:, None] * GROUP_IN
                row_length = GROUP_IN
                held = seen[None, :] & (inner >= 0) & (inner < GROUP_IN)
            mask_k = (k0 + tl.arange(0, BLOCK_K) < RANGE) & (offs_k < ROWS)
            valid = inside[:, None] & mask_k[None, :]
            if FRESH:
                g = tl.load(fresh_ptr + row[:, None] * stride_fresh + offs_k[None, :], mask=valid, other=0.0)
                raw = fresh_raw_ptr + row[:, None] * stride_fresh_raw + offs_k[None, :]
                raw = tl.load(raw, mask=valid, other=0.0).to(tl.float32)
                a = tl.load(coefficient_ptr + offs_k, mask=mask_k, other=0.0)
                b = tl.load(coefficient_ptr + stride_coefficient + offs_k, mask=mask_k, other=0.0)
                c = tl.load(coefficient_ptr + 2 * stride_coefficient + offs_k, mask=mask_k, other=0.0)
                value = a[None, :] * g.to(tl.float32) + b[None, :] * raw + c[None, :]
                if FRESH_UP:
                    up = fresh_up_ptr + row[:, None] * stride_fresh_up + offs_k[None, :]
                    value += tl.load(up, mask=valid, other=0.0).to(tl.float32)
                if PASSED:
                    passed = passed_ptr + row[:, None] * stride_passed + offs_k[None, :]
                    value += tl.load(passed, mask=valid, other=0.0).to(tl.float32)
                dy = tl.where(valid, value, 0.0).to(dy_ptr.dtype.element_ty)
                # Its own pixels pass through the middle tap; programs of other channels write the same.
                place = source + row[:, None] * stride_dy + offs_k[None, :]
                tl.store(place, dy, mask=valid & (tap == KERNEL * KERNEL // 2))
            else:
                dy = tl.load(source + row[:, None] * stride_dy + offs_k[None, :], mask=valid, other=0.0)
            place = (offs_k[:, None] * (KERNEL * KERNEL) + tap) * row_length + inner
            weight = tl.load(weights + place, mask=mask_k[:, None] & held, other=0.0)  # [BLOCK_K, BLOCK_N]
            part = tl.dot(dy, weight, part, input_precision=PRECISION)
    if HAS_MASK:
        dropped = (
            mask_ptr
            + aligned(tl.load(readers_ptr + reader * 4 + 3), ALIGN)
            + image[:, None] * stride_mask
            + column[None, :]
        )
        part *= tl.load(dropped, mask=mask_p[:, None] & seen[None, :], other=0.0).to(tl.float32)
    return part


@triton.jit(
    do_not_specialize=[
        "first_reader", "last_reader", "target", "P", "H", "W", "OUT_H", "OUT_W",
        "stride_dy", "step_dy", "stride_mask", "stride_upstream", "stride_raw", "stride_norm",
        "stride_fresh", "stride_fresh_raw", "stride_coefficient", "stride_fresh_up", "stride_passed", "stride_g",
    ]
)  # fmt: skip
def data_gradient_kernel(
    dy_ptr, weight_ptr, readers_ptr, mask_ptr, upstream_ptr, raw_ptr, norm_ptr,
    fresh_ptr, fresh_raw_ptr, coefficient_ptr, fresh_up_ptr, passed_ptr,
    g_ptr, tile_g_ptr, tile_gx_ptr, counter_ptr,
    first_reader, last_reader, target, P, H, W, OUT_H, OUT_W, eps,
    stride_dy, step_dy, stride_mask, stride_upstream, stride_raw, stride_norm,
    stride_fresh, stride_fresh_raw, stride_coefficient, stride_fresh_up, stride_passed, stride_g,
    C: tl.constexpr, ROWS: tl.constexpr, GROUP_IN: tl.constexpr, GROUP_OUT: tl.constexpr, RANGE: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    WINDOWS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_UPSTREAM: tl.constexpr, NORM: tl.constexpr,
    FRESH: tl.constexpr, FRESH_UP: tl.constexpr, PASSED: tl.constexpr, BATCH: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, FAN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of buffer channels [target, target + C).

    A row of `readers` is (window start, window width, offset of its weight, offset of its mask); reader i's dy begins
    i·step_dy elements on. WINDOWS: a reader's conv is dense over its own window; otherwise conv groups of GROUP_IN to
    GROUP_OUT channels, of which RANGE outputs, from the tile's first group on, cover the tile.
    ALIGN divides offsets and strides.
    """
    target, stride_dy, step_dy = aligned(target, ALIGN), aligned(stride_dy, ALIGN), aligned(step_dy, ALIGN)
    stride_mask, stride_upstream = aligned(stride_mask, ALIGN), aligned(stride_upstream, ALIGN)
    stride_raw, stride_g = aligned(stride_raw, ALIGN), aligned(stride_g, ALIGN)
    stride_fresh, stride_fresh_raw = aligned(stride_fresh, ALIGN), aligned(stride_fresh_raw, ALIGN)
    stride_fresh_up, stride_passed = aligned(stride_fresh_up, ALIGN), aligned(stride_passed, ALIGN)
    pid_n = tl.program_id(1)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    mask_p = offs_p < P
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C

    acc = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    if FRESH:
        acc += gathered(
            first_reader, dy_ptr, weight_ptr, readers_ptr, mask_ptr,
            fresh_ptr, fresh_raw_ptr, coefficient_ptr, fresh_up_ptr, passed_ptr,
            target, P, H, W, OUT_H, OUT_W, stride_dy, step_dy, stride_mask,
            stride_fresh, stride_fresh_raw, stride_coefficient, stride_fresh_up, stride_passed,
            offs_p, mask_p, offs_n, mask_n, pid_n, ROWS, GROUP_IN, GROUP_OUT, RANGE, KERNEL, STRIDE, WINDOWS, HAS_MASK,
            True, FRESH_UP, PASSED, ALIGN, PRECISION, BLOCK_P, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        first_reader += 1
    for reader in range(first_reader, last_reader):
        acc += gathered(
            reader, dy_ptr, weight_ptr, readers_ptr, mask_ptr,
            fresh_ptr, fresh_raw_ptr, coefficient_ptr, fresh_up_ptr, passed_ptr,
            target, P, H, W, OUT_H, OUT_W, stride_dy, step_dy, stride_mask,
            stride_fresh, stride_fresh_raw, stride_coefficient, stride_fresh_up, stride_passed,
            offs_p, mask_p, offs_n, mask_n, pid_n, ROWS, GROUP_IN, GROUP_OUT, RANGE, KERNEL, STRIDE, WINDOWS, HAS_MASK,
            False, False, False, ALIGN, PRECISION, BLOCK_P, BLOCK_N, BLOCK_K,
        )  # fmt: skip

    valid = mask_p[:, None] & mask_n[None, :]
    if HAS_UPSTREAM:
        upstream = upstream_ptr + offs_p[:, None] * stride_upstream + offs_n[None, :]
        acc += tl.load(upstream, mask=valid, other=0.0).to(tl.float32)
    if NORM:
        raw = tl.load(raw_ptr + offs_p[:, None] * stride_raw + offs_n[None, :], mask=valid, other=0.0).to(tl.float32)
        scale = tl.load(norm_ptr + 4 * stride_norm + offs_n, mask=mask_n, other=0.0)
        shift = tl.load(norm_ptr + 5 * stride_norm + offs_n, mask=mask_n, other=0.0)
        acc = tl.where(valid & (raw * scale[None, :] + shift[None, :] > 0), acc, 0.0)
        tl.store(g_ptr + offs_p[:, None] * stride_g + offs_n[None, :], acc.to(g_ptr.dtype.element_ty), mask=valid)
        mean = tl.load(norm_ptr + 2 * stride_norm + offs_n, mask=mask_n, other=0.0)
        rstd = 1.0 / tl.sqrt(tl.load(norm_ptr + 3 * stride_norm + offs_n, mask=mask_n, other=1.0) + eps)
        normal = (raw - mean[None, :]) * rstd[None, :]
        finish_gradients(
            tl.sum(acc, axis=0), tl.sum(acc * normal, axis=0), tile_g_ptr, tile_gx_ptr, counter_ptr,
            norm_ptr, stride_norm, C, offs_n, mask_n, P, eps, BATCH, BLOCK_N, FAN,
        )  # fmt: skip
    else:
        tl.store(g_ptr + offs_p[:, None] * stride_g + offs_n[None, :], acc.to(g_ptr.dtype.element_ty), mask=valid)


class Fresh(NamedTuple):
    """A reader's gradient in front of its BN: g and the raw output [P, k], the BN's vectors, what is added to it."""

    g: Tensor
    raw: Tensor
    norm: Tensor
    upstream: Tensor | None = None
    passed: Tensor | None = None


def data_gradient(
    dy: Tensor,
    weight: Tensor,
    shape: ConvShape,
    readers: Readers,
    span: tuple[int, int],
    target: int,
    channels: int,
    out: Tensor,
    eps: float,
    *,
    windows: bool,
    fresh: Fresh | None = None,
    mask: Tensor | None = None,
    upstream: Tensor | None = None,
    raw: Tensor | None = None,
    norm: Tensor | None = None,
    scratch: Scratch | None = None,
    batch: bool = True,
) -> None:
    """out [P_in, channels]: gradient of channels [target, …) from the readers in `span`; dy [readers, P_out, c_out].

    With `norm` (vectors [11, channels]) it goes through that BN's ReLU, and the BN's gradients and coefficients are
    written; `batch` says that its statistics were the batch's. `fresh` is the first reader's dy, which is then written.
    """
    if recorders.get():
        recorders.get()[-1](data_gradient, locals())
    new = fresh or Fresh(out, out, out)
    grid, constants = _fixed(
        shape, channels, windows, mask is not None, upstream is not None, norm is not None, fresh is not None,
        new.upstream is not None, new.passed is not None, batch,
        alignment(
            readers.align, channels, target, dy.stride(-2), dy.stride(0), row_stride(mask), row_stride(upstream),
            row_stride(raw), new.g.stride(0), new.raw.stride(0), row_stride(new.upstream), row_stride(new.passed),
            out.stride(0),
        ),
        wide(dy, out, mask, raw, upstream, new.raw, new.upstream),
        precision(out.dtype), out.element_size(), architecture(out.device), pinned(),
    )  # fmt: skip
    vectors = out if norm is None else norm
    run(
        data_gradient_kernel, grid,
        dy, weight, readers.rows, dy if mask is None else mask, dy if upstream is None else upstream,
        out if raw is None else raw, vectors,
        new.g, new.raw, new.norm if fresh is None else new.norm[A], dy if new.upstream is None else new.upstream,
        dy if new.passed is None else new.passed, out, *((out,) * 3 if scratch is None else scratch),
        span[0], span[1], target, shape.in_pixels, shape.height, shape.width, shape.out_height, shape.out_width, eps,
        dy.stride(-2), dy.stride(0), row_stride(mask), row_stride(upstream), row_stride(raw), vectors.stride(0),
        new.g.stride(0), new.raw.stride(0), new.norm.stride(0), row_stride(new.upstream), row_stride(new.passed),
        out.stride(0), **constants,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _fixed(
    shape: ConvShape,
    channels: int,
    windows: bool,
    has_mask: bool,
    has_upstream: bool,
    norm: bool,
    fresh: bool,
    fresh_up: bool,
    passed: bool,
    batch: bool,
    align: int,
    wide: bool,
    precision: str,
    element_size: int,
    arch: str,
    pins: object,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and compile-time constants: derived once, not for every launch."""
    if windows:
        block_n, reach = channel_tile(channels, channels), shape.c_out
        group_in = group_out = 1  # not read: one kernel for all widths
    else:
        block_n = channel_tile(shape.read, shape.group_in)
        reach = covered(block_n, shape.group_in, shape.group_out, shape.read, shape.c_out)
        group_in, group_out = shape.group_in, shape.group_out
    config = config_for("data_gradient", reach, block_n, element_size, arch, shape.kernel**2)
    return (cdiv(shape.in_pixels, config.block_p), cdiv(channels, block_n)), dict(
        C=channels, ROWS=shape.c_out, GROUP_IN=group_in, GROUP_OUT=group_out, RANGE=reach,
        KERNEL=shape.kernel, STRIDE=shape.stride, WINDOWS=windows, HAS_MASK=has_mask,
        HAS_UPSTREAM=has_upstream, NORM=norm, FRESH=fresh, FRESH_UP=fresh_up, PASSED=passed, BATCH=batch, ALIGN=align,
        WIDE=wide, PRECISION=precision, FAN=FAN,
        BLOCK_P=config.block_p, BLOCK_N=block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

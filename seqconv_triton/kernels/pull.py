"""The data gradient of the convs over windows, in pull form: a channel gathers from every later group that read it.

g[p, c] = Σ_i mask_i · Σ_taps W_i[:, c − start_i, tap]ᵀ · dz_i[p − tap]  over the readers i whose window holds c, then
what reaches c from behind the stage, the ReLU of channel c and the sums of BN's backward. Written once, summed in
float32.

The first reader of a 1×1 conv's gradient has only just got its BN's sums: it is taken through that BN on load,
dz = a·g + b·z + c, and stored for the readers after it (`Newest`); one tap reads each value once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.configs import architecture, config_for, pinned
from seqconv_triton.kernels.heuristic import channel_tile
from seqconv_triton.kernels.launch import (
    FAN,
    BatchNorm,
    NormGradient,
    Scratch,
    Windows,
    alignment,
    cdiv,
    precision,
    row_stride,
    run,
    tunable,
    wide,
)
from seqconv_triton.kernels.statistics import finish_gradient
from seqconv_triton.kernels.tiles import aligned, rows_to_tap, taps_inside


@triton.jit
def reader_window(
    reader, readers_ptr, ROWS: tl.constexpr, TAPS: tl.constexpr, WINDOW: tl.constexpr, ALIGN: tl.constexpr
):
    """A reader's first channel, its channels, and where its weight and its dropout mask begin."""
    if readers_ptr is None:  # windows of WINDOW channels, each ROWS further on
        return reader * ROWS, WINDOW, reader * (ROWS * TAPS * WINDOW), reader * WINDOW
    else:
        row = readers_ptr + reader * 4
        start, width = aligned(tl.load(row).to(tl.int32), ALIGN), aligned(tl.load(row + 1).to(tl.int32), ALIGN)
        return start, width, aligned(tl.load(row + 2), ALIGN), aligned(tl.load(row + 3), ALIGN)


@triton.jit
def weight_tile(
    weight_ptr, readers_ptr, reader, tap, offs_k, channels, mask_n,
    ROWS: tl.constexpr, TAPS: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """W_i[offs_k, tap, channels − start_i], [BLOCK_K, BLOCK_N]; zero where the window does not reach."""
    start, width, offset, _ = reader_window(reader, readers_ptr, ROWS, TAPS, WINDOW, ALIGN)
    column = channels - start
    seen = mask_n if EXACT else mask_n & (column >= 0) & (column < width)
    valid = seen[None, :] if EVEN_K else seen[None, :] & (offs_k < ROWS)[:, None]
    place = weight_ptr + offset + (offs_k[:, None] * TAPS + tap) * width + column[None, :]
    return tl.load(place, mask=valid, other=0.0)


@triton.jit
def reader_step(
    acc, dz_ptr, weight_ptr, readers_ptr, reader, tap, k0, place_p, bits, mask_p, channels, mask_n, W,
    stride_dz, step_dz, ROWS: tl.constexpr, KERNEL: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + what one pixel of the neighbourhood, and BLOCK_K outputs, bring of one reader."""
    offs_k = k0 + tl.arange(0, BLOCK_K)
    dz_ptr += tl.cast(reader, tl.int64) * step_dz
    if KERNEL > 1:
        place_p += rows_to_tap(tap, W, KERNEL) * stride_dz
        mask_p = ((bits >> tap) & 1) != 0
        # The weight, not the pixel: a bit below the first, in a copy that the last step skips, is undefined.
        tap = KERNEL * KERNEL - 1 - tap
    valid = mask_p[:, None] if EVEN_K else mask_p[:, None] & (offs_k < ROWS)[None, :]
    dz = tl.load(dz_ptr + place_p[:, None] + offs_k[None, :], mask=valid, other=0.0)
    weight = weight_tile(
        weight_ptr, readers_ptr, reader, tap, offs_k, channels, mask_n, ROWS, KERNEL * KERNEL, WINDOW, EXACT, EVEN_K,
        ALIGN,
    )  # fmt: skip
    return tl.dot(dz, weight, acc, input_precision=PRECISION)


@triton.jit
def newest_product(
    acc, g_ptr, raw_ptr, coefficient_ptr, dz_ptr, weight_ptr, readers_ptr, reader,
    offs_p, mask_p, channels, mask_n, stride_g, stride_raw, stride_dz, step_dz,
    ROWS: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + the first reader's part, whose dz = a·g + b·z + c is computed here and stored."""
    dz_ptr += tl.cast(reader, tl.int64) * step_dz
    # One stage: the left side of a product that is computed must not be overwritten while that is under way.
    for k0 in tl.range(0, ROWS, BLOCK_K, num_stages=1):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < ROWS
        valid = mask_p[:, None] & mask_k[None, :]
        g = tl.load(g_ptr + offs_p[:, None] * stride_g + offs_k[None, :], mask=valid, other=0.0)
        z = tl.load(raw_ptr + offs_p[:, None] * stride_raw + offs_k[None, :], mask=valid, other=0.0)
        a = tl.load(coefficient_ptr + offs_k, mask=mask_k, other=0.0)
        b = tl.load(coefficient_ptr + ROWS + offs_k, mask=mask_k, other=0.0)
        c = tl.load(coefficient_ptr + 2 * ROWS + offs_k, mask=mask_k, other=0.0)
        dz = a[None, :] * g.to(tl.float32) + b[None, :] * z.to(tl.float32) + c[None, :]
        dz = dz.to(dz_ptr.dtype.element_ty)
        # Programs of other channels store the same.
        tl.store(dz_ptr + offs_p[:, None] * stride_dz + offs_k[None, :], dz, mask=valid)
        weight = weight_tile(
            weight_ptr, readers_ptr, reader, 0, offs_k, channels, mask_n, ROWS, 1, WINDOW, EXACT, EVEN_K, ALIGN
        )  # fmt: skip
        acc = tl.dot(dz, weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dropped(
    part, mask_ptr, readers_ptr, reader, image, channels, mask_p, mask_n, stride_mask,
    ROWS: tl.constexpr, TAPS: tl.constexpr, WINDOW: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A reader's part, multiplied by its dropout mask."""
    start, width, _, offset = reader_window(reader, readers_ptr, ROWS, TAPS, WINDOW, ALIGN)
    column = channels - start
    valid = mask_p[:, None] & (mask_n & (column >= 0) & (column < width))[None, :]
    place = mask_ptr + offset + image[:, None] * stride_mask + column[None, :]
    return part * tl.load(place, mask=valid, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "first_reader", "last_reader", "target", "P", "H", "W", "stride_dz", "step_dz", "stride_mask",
        "stride_upstream", "stride_newest", "stride_newest_raw", "stride_g", "stride_raw",
    ]
)  # fmt: skip
def pull_kernel(
    dz_ptr, weight_ptr, readers_ptr, mask_ptr, upstream_ptr, newest_ptr, newest_raw_ptr, newest_coefficient_ptr,
    g_ptr, raw_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, d_gamma_ptr, d_beta_ptr, coefficient_ptr,
    tile_g_ptr, tile_gx_ptr, counter_ptr,
    first_reader, last_reader, target, P, H, W,
    stride_dz, step_dz, stride_mask, stride_upstream, stride_newest, stride_newest_raw, stride_g, stride_raw, eps,
    C: tl.constexpr, ROWS: tl.constexpr, KERNEL: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
    BATCH: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g [P, C] of channels [target, target + C) from dz [readers, P, ROWS]; ALIGN divides offsets and strides.

    Reader i's window is [i·ROWS, i·ROWS + WINDOW), or stands in row i of `readers`. EXACT: every reader's window holds
    all of the channels.
    """
    target, stride_dz, step_dz = aligned(target, ALIGN), aligned(stride_dz, ALIGN), aligned(step_dz, ALIGN)
    stride_mask, stride_upstream = aligned(stride_mask, ALIGN), aligned(stride_upstream, ALIGN)
    stride_newest, stride_newest_raw = aligned(stride_newest, ALIGN), aligned(stride_newest_raw, ALIGN)
    stride_g, stride_raw = aligned(stride_g, ALIGN), aligned(stride_raw, ALIGN)
    TAPS: tl.constexpr = KERNEL * KERNEL
    STEPS: tl.constexpr = (ROWS + BLOCK_K - 1) // BLOCK_K
    EVEN_K: tl.constexpr = ROWS % BLOCK_K == 0
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_p, mask_n, channels = offs_p < P, offs_n < C, target + offs_n
    bits, image = offs_p, offs_p // (H * W)
    if KERNEL > 1:
        bits = taps_inside((offs_p // W) % H, offs_p % W, mask_p, H, W, KERNEL)
    if WIDE:
        offs_p, image = offs_p.to(tl.int64), image.to(tl.int64)
    place_p = offs_p * stride_dz

    acc = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    if newest_ptr is not None:
        acc = newest_product(
            acc, newest_ptr, newest_raw_ptr, newest_coefficient_ptr, dz_ptr, weight_ptr, readers_ptr, first_reader,
            offs_p, mask_p, channels, mask_n, stride_newest, stride_newest_raw, stride_dz, step_dz,
            ROWS, WINDOW, EXACT, EVEN_K, ALIGN, PRECISION, BLOCK_K,
        )  # fmt: skip
        if mask_ptr is not None:
            acc = dropped(
                acc, mask_ptr, readers_ptr, first_reader, image, channels, mask_p, mask_n, stride_mask, ROWS, TAPS,
                WINDOW, ALIGN,
            )  # fmt: skip
        first_reader += 1
    if mask_ptr is None:
        for step in range((last_reader - first_reader) * (TAPS * STEPS)):
            acc = reader_step(
                acc, dz_ptr, weight_ptr, readers_ptr, first_reader + step // (TAPS * STEPS), step // STEPS % TAPS,
                step % STEPS * BLOCK_K, place_p, bits, mask_p, channels, mask_n, W, stride_dz, step_dz,
                ROWS, KERNEL, WINDOW, EXACT, EVEN_K, ALIGN, PRECISION, BLOCK_K,
            )  # fmt: skip
    else:
        for reader in range(first_reader, last_reader):
            part = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
            for step in range(TAPS * STEPS):
                part = reader_step(
                    part, dz_ptr, weight_ptr, readers_ptr, reader, step // STEPS, step % STEPS * BLOCK_K, place_p, bits,
                    mask_p, channels, mask_n, W, stride_dz, step_dz,
                    ROWS, KERNEL, WINDOW, EXACT, EVEN_K, ALIGN, PRECISION, BLOCK_K,
                )  # fmt: skip
            acc += dropped(
                part, mask_ptr, readers_ptr, reader, image, channels, mask_p, mask_n, stride_mask, ROWS, TAPS, WINDOW,
                ALIGN,
            )  # fmt: skip

    valid = mask_p[:, None] & mask_n[None, :]
    if upstream_ptr is not None:
        upstream = upstream_ptr + offs_p[:, None] * stride_upstream + offs_n[None, :]
        acc += tl.load(upstream, mask=valid, other=0.0).to(tl.float32)
    if raw_ptr is not None:
        finish_gradient(
            acc, g_ptr, stride_g, raw_ptr, stride_raw, gamma_ptr, beta_ptr, mean_ptr, var_ptr, d_gamma_ptr, d_beta_ptr,
            coefficient_ptr, tile_g_ptr, tile_gx_ptr, counter_ptr, offs_p, offs_n, valid, mask_n, C, P, eps,
            BATCH, BLOCK_N, FAN,
        )  # fmt: skip
    else:
        tl.store(g_ptr + offs_p[:, None] * stride_g + offs_n[None, :], acc.to(g_ptr.dtype.element_ty), mask=valid)


class NewestGradient(NamedTuple):
    """The first reader's gradient in front of its BN: g and the raw output z, [P, k], and that BN's coefficients."""

    g: Tensor | None
    raw: Tensor | None
    coefficients: Tensor | None


@tunable
def pull(
    dz: Tensor,
    weight: Tensor,
    windows: Windows,
    readers: tuple[int, int],
    target: int,
    g: Tensor,
    *,
    newest: NewestGradient | None = None,
    mask: Tensor | None = None,
    upstream: Tensor | None = None,
    raw: Tensor | None = None,
    norm: BatchNorm | None = None,
    into: NormGradient | None = None,
    scratch: Scratch | None = None,
    eps: float = 0.0,
    batch: bool = True,
) -> None:
    """g [P, C]: the gradient of channels [target, target + C) from the readers [first, last) of `windows`.

    dz [groups, P, k]; weight holds all groups' [k, taps, window] end to end. With `newest` the first reader's dz is
    written. `raw`, `norm`, `into`, `scratch` and `batch` as for `transposed`.
    """
    channels = g.shape[1]
    exact = windows.table is None and windows.channels % dz.shape[2] == 0 and target >= windows.channels
    new = newest or NewestGradient(None, None, None)
    grid, constants = _constants(
        windows.shape, channels, 0 if windows.table is not None else windows.channels, exact, batch, alignment(
            windows.align, channels, target, dz.stride(1), dz.stride(0), row_stride(mask), row_stride(upstream),
            row_stride(new.g), row_stride(new.raw), g.stride(0), row_stride(raw),
        ),
        wide(dz, g, mask, raw, upstream, new.raw), precision(dz.dtype), dz.element_size(), architecture(dz.device),
        pinned(),
    )  # fmt: skip
    gamma, beta, mean, var = norm or BatchNorm(None, None, None, None)
    out = into or NormGradient(None, None, None)
    sums = scratch or Scratch(None, None, None)
    run(
        pull_kernel, grid,
        dz_ptr=dz, weight_ptr=weight, readers_ptr=windows.table, mask_ptr=mask, upstream_ptr=upstream,
        newest_ptr=new.g, newest_raw_ptr=new.raw, newest_coefficient_ptr=new.coefficients,
        g_ptr=g, raw_ptr=raw, gamma_ptr=gamma, beta_ptr=beta, mean_ptr=mean, var_ptr=var,
        d_gamma_ptr=out.weight, d_beta_ptr=out.bias, coefficient_ptr=out.coefficients,
        tile_g_ptr=sums.first, tile_gx_ptr=sums.second, counter_ptr=sums.counters,
        first_reader=readers[0], last_reader=readers[1], target=target,
        P=windows.shape.in_pixels, H=windows.shape.height, W=windows.shape.width,
        stride_dz=dz.stride(1), step_dz=dz.stride(0), stride_mask=row_stride(mask),
        stride_upstream=row_stride(upstream), stride_newest=row_stride(new.g),
        stride_newest_raw=row_stride(new.raw), stride_g=g.stride(0),
        stride_raw=row_stride(raw), eps=eps, **constants,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _constants(
    shape: Any, channels: int, window: int, exact: bool, batch: bool, align: int, wide: bool, precision: str,
    element_size: int, arch: str, pins: object,
) -> tuple[tuple[int, int], dict[str, Any]]:  # fmt: skip
    """Grid and compile-time constants."""
    block_n = channel_tile(channels, channels)
    config = config_for("pull", shape.c_out, block_n, element_size, arch, shape.kernel**2)
    return (cdiv(shape.in_pixels, config.block_p), cdiv(channels, block_n)), dict(
        C=channels, ROWS=shape.c_out, KERNEL=shape.kernel, WINDOW=window, EXACT=exact, BATCH=batch, ALIGN=align,
        WIDE=wide, PRECISION=precision, FAN=FAN,
        BLOCK_P=config.block_p, BLOCK_N=block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

"""BN's sums over all pixels, without a launch of their own: the last program to arrive combines those of the tiles.

mean = Σ n_t·mean_t / P and M2 = Σ (M2_t + n_t·(mean_t − mean)²) over the tiles t (Chan et al., 1983); in backward Σg
and Σg·x̂. FAN tiles at a time, then all of those, always in the same order whoever comes last: two runs, same bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.launch import FAN, BatchNorm, Scratch, alignment, cdiv, row_stride, run, wide
from seqconv_triton.kernels.tiles import aligned


def compiled_for_hip(_semantic: Any = None) -> tl.constexpr:
    """Whether a kernel is being compiled for an AMD GPU, for kernels; the interpreter compiles nothing."""
    return tl.constexpr(_semantic is not None and _semantic.builder.options.backend_name == "hip")


compiled_for_hip.__triton_builtin__ = True  # type: ignore[attr-defined] # as Triton's own: it is given _semantic


@triton.jit
def arrived_last(counter_ptr, expected):
    """Whether this program is the last of `expected` to come here; the counter is zero again afterwards."""
    if compiled_for_hip():  # there the release waits for the stores of its own wave alone: each waits for its own
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [tl.zeros((1,), tl.int32)], tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()  # every thread's stores come before the release below
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_of_products(x, y, valid):
    """Σ x·y over the rows of a tile."""
    product = x * y
    if compiled_for_hip():
        # Its compiler makes `product + neighbour's product` one FMA, which rounds otherwise in the neighbour's lane,
        # and the lanes that write a sum differ by a bit; through a choice it does not.
        product = tl.where(valid, product, 0.0)
    return tl.sum(product, axis=0)


@triton.jit
def merged_statistics(
    mean_ptr, m2_ptr, first, last, C, offs_n, mask_n, pixels, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    FAN: tl.constexpr,
):  # fmt: skip
    """Mean and M2 over rows [first, last), each of TILE of the `pixels` (the very last one may be shorter)."""
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for t0 in range(first, last, FAN):
        offs_t = t0 + tl.arange(0, FAN)
        valid = (offs_t < last)[:, None] & mask_n[None, :]
        count = tl.minimum(pixels - offs_t * TILE, TILE).to(tl.float32)
        place = offs_t[:, None] * C + offs_n[None, :]
        tile_mean = tl.load(mean_ptr + place, mask=valid, other=0.0, volatile=True)
        total += tl.sum(tl.where(valid, tile_mean * count[:, None], 0.0), axis=0)
    mean = total / tl.minimum(pixels - first * TILE, (last - first) * TILE).to(tl.float32)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for t0 in range(first, last, FAN):
        offs_t = t0 + tl.arange(0, FAN)
        valid = (offs_t < last)[:, None] & mask_n[None, :]
        count = tl.minimum(pixels - offs_t * TILE, TILE).to(tl.float32)
        place = offs_t[:, None] * C + offs_n[None, :]
        away = tl.load(mean_ptr + place, mask=valid, other=0.0, volatile=True) - mean[None, :]
        within = tl.load(m2_ptr + place, mask=valid, other=0.0, volatile=True)
        squares += tl.sum(tl.where(valid, within + count[:, None] * away * away, 0.0), axis=0)
    return mean, squares


@triton.jit
def finish_statistics(
    x, valid, tile_mean_ptr, tile_m2_ptr, counter_ptr, mean_ptr, var_ptr, C, offs_n, mask_n, pixels,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """Take part with a tile x [TILE, BLOCK_N] of float32; whoever is last writes mean and biased variance."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    count = tl.minimum(pixels - tile * TILE, TILE).to(tl.float32)
    mean = tl.sum(tl.where(valid, x, 0.0), axis=0) / count
    deviation = tl.where(valid, x - mean[None, :], 0.0)
    chunks = tl.cdiv(tiles, FAN)
    tl.store(tile_mean_ptr + tile * C + offs_n, mean, mask=mask_n)
    tl.store(tile_m2_ptr + tile * C + offs_n, sum_of_products(deviation, deviation, valid), mask=mask_n)
    chunk = tile // FAN
    counters = counter_ptr + tl.program_id(1) * (chunks + 1)
    first = chunk * FAN
    last = tl.minimum(first + FAN, tiles)
    if arrived_last(counters + chunk, last - first):
        chunk_mean, chunk_m2 = merged_statistics(
            tile_mean_ptr, tile_m2_ptr, first, last, C, offs_n, mask_n, pixels, TILE, BLOCK_N, FAN
        )
        tile_mean_ptr += tiles * C
        tile_m2_ptr += tiles * C
        tl.store(tile_mean_ptr + chunk * C + offs_n, chunk_mean, mask=mask_n)
        tl.store(tile_m2_ptr + chunk * C + offs_n, chunk_m2, mask=mask_n)
        if arrived_last(counters + chunks, chunks):
            all_mean, all_m2 = merged_statistics(
                tile_mean_ptr, tile_m2_ptr, 0, chunks, C, offs_n, mask_n, pixels, TILE * FAN, BLOCK_N, FAN
            )
            tl.store(mean_ptr + offs_n, all_mean, mask=mask_n)
            tl.store(var_ptr + offs_n, all_m2 / pixels, mask=mask_n)


@triton.jit
def merged_sums(
    g_ptr, gx_ptr, first, last, C, offs_n, mask_n, BLOCK_N: tl.constexpr, FAN: tl.constexpr
):  # fmt: skip
    """Both sums over rows [first, last)."""
    sum_g = tl.zeros((BLOCK_N,), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for t0 in range(first, last, FAN):
        offs_t = t0 + tl.arange(0, FAN)
        valid = (offs_t < last)[:, None] & mask_n[None, :]
        place = offs_t[:, None] * C + offs_n[None, :]
        sum_g += tl.sum(tl.load(g_ptr + place, mask=valid, other=0.0, volatile=True), axis=0)
        sum_gx += tl.sum(tl.load(gx_ptr + place, mask=valid, other=0.0, volatile=True), axis=0)
    return sum_g, sum_gx


@triton.jit
def finish_gradient(
    g, g_ptr, stride_g, raw_ptr, stride_raw, gamma_ptr, beta_ptr, mean_ptr, var_ptr,
    d_gamma_ptr, d_beta_ptr, coefficient_ptr, tile_g_ptr, tile_gx_ptr, counter_ptr,
    offs_p, offs_n, valid, mask_n, C, pixels, eps, BATCH: tl.constexpr, BLOCK_N: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """Take a tile of a gradient through ReLU, store it, and take part in its BN's backward.

    Whoever is last writes dγ, dβ and the coefficients [3, C] of dx = a·g + b·x + c, which is
    γ·rstd·(g − Σg/P − x̂·Σ(g·x̂)/P); running statistics (not BATCH) have no b and c. Without statistics x̂ is x.
    """
    raw = tl.load(raw_ptr + offs_p[:, None] * stride_raw + offs_n[None, :], mask=valid, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0)
    beta = tl.load(beta_ptr + offs_n, mask=mask_n, other=0.0)
    mean = tl.zeros_like(gamma)
    rstd = tl.zeros_like(gamma) + 1.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0)
        rstd = 1.0 / tl.sqrt(tl.load(var_ptr + offs_n, mask=mask_n, other=1.0) + eps)
    scale = gamma * rstd
    positive = raw * scale[None, :] + (beta - scale * mean)[None, :] > 0
    g = tl.where(valid & positive, g, 0.0)
    tl.store(g_ptr + offs_p[:, None] * stride_g + offs_n[None, :], g.to(g_ptr.dtype.element_ty), mask=valid)

    tile, tiles = tl.program_id(0), tl.num_programs(0)
    chunks = tl.cdiv(tiles, FAN)
    tl.store(tile_g_ptr + tile * C + offs_n, tl.sum(g, axis=0), mask=mask_n)
    normal = (raw - mean[None, :]) * rstd[None, :]
    tl.store(tile_gx_ptr + tile * C + offs_n, sum_of_products(g, normal, valid), mask=mask_n)
    chunk = tile // FAN
    counters = counter_ptr + tl.program_id(1) * (chunks + 1)
    first = chunk * FAN
    last = tl.minimum(first + FAN, tiles)
    if arrived_last(counters + chunk, last - first):
        chunk_g, chunk_gx = merged_sums(tile_g_ptr, tile_gx_ptr, first, last, C, offs_n, mask_n, BLOCK_N, FAN)
        tile_g_ptr += tiles * C
        tile_gx_ptr += tiles * C
        tl.store(tile_g_ptr + chunk * C + offs_n, chunk_g, mask=mask_n)
        tl.store(tile_gx_ptr + chunk * C + offs_n, chunk_gx, mask=mask_n)
        if arrived_last(counters + chunks, chunks):
            all_g, all_gx = merged_sums(tile_g_ptr, tile_gx_ptr, 0, chunks, C, offs_n, mask_n, BLOCK_N, FAN)
            b = tl.zeros_like(gamma)
            c = tl.zeros_like(gamma)
            if BATCH:
                b = -scale * rstd * all_gx / pixels
                c = -scale * all_g / pixels - b * mean
            tl.store(d_gamma_ptr + offs_n, all_gx, mask=mask_n)
            tl.store(d_beta_ptr + offs_n, all_g, mask=mask_n)
            tl.store(coefficient_ptr + offs_n, scale, mask=mask_n)
            tl.store(coefficient_ptr + C + offs_n, b, mask=mask_n)
            tl.store(coefficient_ptr + 2 * C + offs_n, c, mask=mask_n)


@triton.jit(do_not_specialize=["P", "stride_x", "stride_copy"])
def input_statistics_kernel(
    x_ptr, copy_ptr, tile_mean_ptr, tile_m2_ptr, counter_ptr, mean_ptr, var_ptr, P, stride_x, stride_copy,
    CHANNELS: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, FAN: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and variance of x [P, CHANNELS], which is copied along the way."""
    stride_x, stride_copy = aligned(stride_x, ALIGN), aligned(stride_copy, ALIGN)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < CHANNELS
    valid = mask_p[:, None] & mask_n[None, :]
    x = tl.load(x_ptr + offs_p[:, None] * stride_x + offs_n[None, :], mask=valid, other=0.0)
    tl.store(copy_ptr + offs_p[:, None] * stride_copy + offs_n[None, :], x, mask=valid)
    finish_statistics(
        x.to(tl.float32), valid, tile_mean_ptr, tile_m2_ptr, counter_ptr, mean_ptr, var_ptr,
        CHANNELS, offs_n, mask_n, P, BLOCK_P, BLOCK_N, FAN,
    )  # fmt: skip


def input_statistics(x: Tensor, copy: Tensor, norm: BatchNorm, scratch: Scratch) -> None:
    """Mean and biased variance of x [P, C] into those of norm, and x into `copy`, [P, C] too."""
    pixels, channels = x.shape
    block_p, block_n = 64, 64
    run(
        input_statistics_kernel, (cdiv(pixels, block_p), cdiv(channels, block_n)),
        x_ptr=x, copy_ptr=copy, tile_mean_ptr=scratch.first, tile_m2_ptr=scratch.second, counter_ptr=scratch.counters,
        mean_ptr=norm.mean, var_ptr=norm.var, P=pixels, stride_x=row_stride(x), stride_copy=row_stride(copy),
        CHANNELS=channels, ALIGN=alignment(row_stride(x), row_stride(copy)), WIDE=wide(x, copy), FAN=FAN,
        BLOCK_P=block_p, BLOCK_N=block_n,
        num_warps=8 if x.element_size() > 2 else 4,  # four spill a tile of float32 on sm_8x and sm_12x
    )  # fmt: skip

"""BN's sums over all pixels, without a launch of their own: the last program to arrive combines those of the tiles.

mean = Σ n_t·mean_t / P and M2 = Σ (M2_t + n_t·(mean_t − mean)²) over the tiles t (Chan et al., 1983); in backward Σg
and Σg·x̂. FAN tiles at a time, then all of those, always in the same order whoever comes last: two runs, same bits.
A BN's vectors are rows of one float32 array (`launch.py` names them), as many elements apart as `stride_norm`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.launch import FAN, Scratch, cdiv, run, wide

ELEMENTWISE_P, ELEMENTWISE_C = 64, 64


@triton.jit
def arrived_last(counter_ptr, expected):
    """Whether this program is the last of `expected` to come here; the counter is zero again afterwards."""
    tl.debug_barrier()  # every thread's stores come before the release below
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


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
    mean, m2, mean_ptr, m2_ptr, counter_ptr, norm_ptr, stride_norm, C, offs_n, mask_n, pixels, eps,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """From a tile's mean and M2; whoever is last writes mean, biased variance, and BN as scale and shift."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    chunks = tl.cdiv(tiles, FAN)
    tl.store(mean_ptr + tile * C + offs_n, mean, mask=mask_n)
    tl.store(m2_ptr + tile * C + offs_n, m2, mask=mask_n)
    chunk = tile // FAN
    counters = counter_ptr + tl.program_id(1) * (chunks + 1)
    first = chunk * FAN
    last = tl.minimum(first + FAN, tiles)
    if arrived_last(counters + chunk, last - first):
        chunk_mean, chunk_m2 = merged_statistics(
            mean_ptr, m2_ptr, first, last, C, offs_n, mask_n, pixels, TILE, BLOCK_N, FAN
        )
        mean_ptr += tiles * C
        m2_ptr += tiles * C
        tl.store(mean_ptr + chunk * C + offs_n, chunk_mean, mask=mask_n)
        tl.store(m2_ptr + chunk * C + offs_n, chunk_m2, mask=mask_n)
        if arrived_last(counters + chunks, chunks):
            all_mean, all_m2 = merged_statistics(
                mean_ptr, m2_ptr, 0, chunks, C, offs_n, mask_n, pixels, TILE * FAN, BLOCK_N, FAN
            )
            var = all_m2 / pixels
            weight = tl.load(norm_ptr + offs_n, mask=mask_n, other=0.0)
            bias = tl.load(norm_ptr + stride_norm + offs_n, mask=mask_n, other=0.0)
            scale = weight / tl.sqrt(var + eps)
            tl.store(norm_ptr + 2 * stride_norm + offs_n, all_mean, mask=mask_n)
            tl.store(norm_ptr + 3 * stride_norm + offs_n, var, mask=mask_n)
            tl.store(norm_ptr + 4 * stride_norm + offs_n, scale, mask=mask_n)
            tl.store(norm_ptr + 5 * stride_norm + offs_n, bias - scale * all_mean, mask=mask_n)


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
def finish_gradients(
    sum_g, sum_gx, g_ptr, gx_ptr, counter_ptr, norm_ptr, stride_norm, C, offs_n, mask_n, pixels, eps,
    BATCH: tl.constexpr, BLOCK_N: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """From a tile's Σg and Σg·x̂; whoever is last writes dγ, dβ and BN's backward dx = a·g + b·x + c.

    dx = γ·rstd·(g − Σg/P − x̂·Σ(g·x̂)/P); running statistics (not BATCH) have no b and c.
    """
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    chunks = tl.cdiv(tiles, FAN)
    tl.store(g_ptr + tile * C + offs_n, sum_g, mask=mask_n)
    tl.store(gx_ptr + tile * C + offs_n, sum_gx, mask=mask_n)
    chunk = tile // FAN
    counters = counter_ptr + tl.program_id(1) * (chunks + 1)
    first = chunk * FAN
    last = tl.minimum(first + FAN, tiles)
    if arrived_last(counters + chunk, last - first):
        chunk_g, chunk_gx = merged_sums(g_ptr, gx_ptr, first, last, C, offs_n, mask_n, BLOCK_N, FAN)
        g_ptr += tiles * C
        gx_ptr += tiles * C
        tl.store(g_ptr + chunk * C + offs_n, chunk_g, mask=mask_n)
        tl.store(gx_ptr + chunk * C + offs_n, chunk_gx, mask=mask_n)
        if arrived_last(counters + chunks, chunks):
            all_g, all_gx = merged_sums(g_ptr, gx_ptr, 0, chunks, C, offs_n, mask_n, BLOCK_N, FAN)
            weight = tl.load(norm_ptr + offs_n, mask=mask_n, other=0.0)
            mean = tl.load(norm_ptr + 2 * stride_norm + offs_n, mask=mask_n, other=0.0)
            rstd = 1.0 / tl.sqrt(tl.load(norm_ptr + 3 * stride_norm + offs_n, mask=mask_n, other=1.0) + eps)
            a = weight * rstd
            b = tl.zeros((BLOCK_N,), dtype=tl.float32)
            c = tl.zeros((BLOCK_N,), dtype=tl.float32)
            if BATCH:
                b = -a * rstd * all_gx / pixels
                c = -a * all_g / pixels - b * mean
            tl.store(norm_ptr + 6 * stride_norm + offs_n, all_gx, mask=mask_n)
            tl.store(norm_ptr + 7 * stride_norm + offs_n, all_g, mask=mask_n)
            tl.store(norm_ptr + 8 * stride_norm + offs_n, a, mask=mask_n)
            tl.store(norm_ptr + 9 * stride_norm + offs_n, b, mask=mask_n)
            tl.store(norm_ptr + 10 * stride_norm + offs_n, c, mask=mask_n)


@triton.jit(do_not_specialize=["P"])
def input_statistics_kernel(
    x_ptr, mean_ptr, m2_ptr, counter_ptr, norm_ptr, P, CHANNELS, stride_x, stride_norm, eps,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """Statistics of x [P, CHANNELS] into its BN's vectors."""
    pid_p = tl.program_id(0)
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    valid = (offs_p < P)[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs_p[:, None] * stride_x + offs_c[None, :], mask=valid, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / tl.minimum(P - pid_p * BLOCK_P, BLOCK_P).to(tl.float32)
    deviation = tl.where(valid, x - mean[None, :], 0.0)
    finish_statistics(
        mean, tl.sum(deviation * deviation, axis=0), mean_ptr, m2_ptr, counter_ptr, norm_ptr, stride_norm,
        CHANNELS, offs_c, mask_c, P, eps, BLOCK_P, BLOCK_C, FAN,
    )  # fmt: skip


def input_statistics(x: Tensor, norm: Tensor, scratch: Scratch, eps: float) -> None:
    """Statistics of x [P, C] into the MEAN, VAR, SCALE and SHIFT rows of norm [rows, C]."""
    pixels, channels = x.shape
    run(
        input_statistics_kernel, (cdiv(pixels, ELEMENTWISE_P), cdiv(channels, ELEMENTWISE_C)),
        x, *scratch, norm, pixels, channels, x.stride(0), norm.stride(0), eps,
        WIDE=wide(x), BLOCK_P=ELEMENTWISE_P, BLOCK_C=ELEMENTWISE_C, FAN=FAN,
    )  # fmt: skip

"""BN statistics and the elementwise parts of BN: tile statistics, Chan's combination, backward terms.

mean = Σ n_t·mean_t / P and M2 = Σ (M2_t + n_t·(mean_t − mean)²) over the tiles t, summed in a fixed order (Chan et al.,
1983). Backward: dx = γ·rstd·(g − Σg/P − x̂·Σ(g·x̂)/P) = a·g + b·x + c with a, b, c per channel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_statistics_kernel(
    x_ptr, mean_ptr, m2_ptr, P, C, stride_x,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every tile of pixels of x [P, C]: two arrays [tiles, C]."""
    pid_p = tl.program_id(0)
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    valid = (offs_p < P)[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs_p[:, None] * stride_x + offs_c[None, :], mask=valid, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / tl.minimum(P - pid_p * BLOCK_P, BLOCK_P).to(tl.float32)
    deviation = tl.where(valid, x - mean[None, :], 0.0)
    tl.store(mean_ptr + pid_p * C + offs_c, mean, mask=mask_c)
    tl.store(m2_ptr + pid_p * C + offs_c, tl.sum(deviation * deviation, axis=0), mask=mask_c)


@triton.jit
def combine_statistics_kernel(
    tile_mean_ptr, tile_m2_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr,
    P, C, tiles, eps,
    TILE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tiles of TILE pixels (the last one shorter) to mean, biased variance, and BN as scale and shift."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for t0 in range(0, tiles, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        valid = (offs_t < tiles)[:, None] & mask_c[None, :]
        count = tl.minimum(P - offs_t * TILE, TILE).to(tl.float32)
        tile_mean = tl.load(tile_mean_ptr + offs_t[:, None] * C + offs_c[None, :], mask=valid, other=0.0)
        total += tl.sum(tl.where(valid, tile_mean * count[:, None], 0.0), axis=0)
    mean = total / P
    squares = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for t0 in range(0, tiles, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        valid = (offs_t < tiles)[:, None] & mask_c[None, :]
        count = tl.minimum(P - offs_t * TILE, TILE).to(tl.float32)
        place = offs_t[:, None] * C + offs_c[None, :]
        away = tl.load(tile_mean_ptr + place, mask=valid, other=0.0) - mean[None, :]
        within = tl.load(tile_m2_ptr + place, mask=valid, other=0.0)
        squares += tl.sum(tl.where(valid, within + count[:, None] * away * away, 0.0), axis=0)
    var = squares / P
    scale = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0) / tl.sqrt(var + eps)
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(var_ptr + offs_c, var, mask=mask_c)
    tl.store(scale_ptr + offs_c, scale, mask=mask_c)
    tl.store(shift_ptr + offs_c, tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0) - scale * mean, mask=mask_c)


@triton.jit
def combine_gradients_kernel(
    tile_g_ptr, tile_gx_ptr, gamma_ptr, mean_ptr, var_ptr, d_gamma_ptr, d_beta_ptr, coefficient_ptr,
    P, C, tiles, eps,
    BATCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tiles' Σg and Σg·x̂ to dβ, dγ and the coefficients a, b, c [3, C]; running statistics have no b and c."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    sum_g = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for t0 in range(0, tiles, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        valid = (offs_t < tiles)[:, None] & mask_c[None, :]
        place = offs_t[:, None] * C + offs_c[None, :]
        sum_g += tl.sum(tl.load(tile_g_ptr + place, mask=valid, other=0.0), axis=0)
        sum_gx += tl.sum(tl.load(tile_gx_ptr + place, mask=valid, other=0.0), axis=0)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = 1.0 / tl.sqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=1.0) + eps)
    a = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0) * rstd
    b = tl.zeros((BLOCK_C,), dtype=tl.float32)
    c = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if BATCH:
        b = -a * rstd * sum_gx / P
        c = -a * sum_g / P - b * mean
    tl.store(d_gamma_ptr + offs_c, sum_gx, mask=mask_c)
    tl.store(d_beta_ptr + offs_c, sum_g, mask=mask_c)
    tl.store(coefficient_ptr + offs_c, a, mask=mask_c)
    tl.store(coefficient_ptr + C + offs_c, b, mask=mask_c)
    tl.store(coefficient_ptr + 2 * C + offs_c, c, mask=mask_c)


@triton.jit
def apply_gradient_kernel(
    g_ptr, x_ptr, coefficient_ptr, upstream_ptr, passed_ptr, dx_ptr,
    P, C, stride_g, stride_x, stride_upstream, stride_passed, stride_dx,
    HAS_UPSTREAM: tl.constexpr, HAS_PASSED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = a·g + b·x + c, plus what reaches the raw features directly: from outside, and through a shortcut."""
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    valid = (offs_p < P)[:, None] & mask_c[None, :]
    a = tl.load(coefficient_ptr + offs_c, mask=mask_c, other=0.0)
    b = tl.load(coefficient_ptr + C + offs_c, mask=mask_c, other=0.0)
    c = tl.load(coefficient_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    g = tl.load(g_ptr + offs_p[:, None] * stride_g + offs_c[None, :], mask=valid, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs_p[:, None] * stride_x + offs_c[None, :], mask=valid, other=0.0).to(tl.float32)
    dx = a[None, :] * g + b[None, :] * x + c[None, :]
    if HAS_UPSTREAM:
        upstream = upstream_ptr + offs_p[:, None] * stride_upstream + offs_c[None, :]
        dx += tl.load(upstream, mask=valid, other=0.0).to(tl.float32)
    if HAS_PASSED:
        passed = passed_ptr + offs_p[:, None] * stride_passed + offs_c[None, :]
        dx += tl.load(passed, mask=valid, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offs_p[:, None] * stride_dx + offs_c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=valid)


@triton.jit
def activate_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, P, C, stride_x, stride_y,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = relu(scale·x + shift): what a layer without a tail gives."""
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    valid = (offs_p < P)[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs_p[:, None] * stride_x + offs_c[None, :], mask=valid, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
    y = x * scale[None, :] + shift[None, :]
    y = tl.where(y < 0, 0.0, y)
    tl.store(y_ptr + offs_p[:, None] * stride_y + offs_c[None, :], y.to(y_ptr.dtype.element_ty), mask=valid)

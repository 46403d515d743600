"""Transposed convolution: the data gradient of a conv inside a group, or of the tail.

g[p, c] = Σ_taps W[:, c, tap]ᵀ · dy[p − tap], then the ReLU of channel c and the sums of BN's backward if one is in
front. With stride 1 that is a conv with mirrored taps; with stride s the pixels fall into s² classes, of which each
meets a few taps only: a program takes pixels of one class.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.configs import architecture, config_for, pinned
from seqconv_triton.kernels.heuristic import channel_tile
from seqconv_triton.kernels.launch import (
    FAN,
    BatchNorm,
    ConvShape,
    NormGradient,
    Scratch,
    alignment,
    cdiv,
    precision,
    row_stride,
    run,
    tunable,
    wide,
)
from seqconv_triton.kernels.statistics import finish_gradient
from seqconv_triton.kernels.tiles import aligned, conv_product, taps_inside


@triton.jit
def strided_product(
    acc, dy_ptr, weight, image, h, w, valid_p, valid_n, H_OUT, W_OUT, stride_dy, first,
    ROWS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + what the taps that meet this class of pixels bring; h and w are of one class each."""
    # h + K // 2 − tap is a multiple of the stride for every STRIDE-th tap only.
    tap_h = (tl.program_id(2) // STRIDE + KERNEL // 2) % STRIDE
    tap_w = (tl.program_id(2) % STRIDE + KERNEL // 2) % STRIDE
    STEPS: tl.constexpr = (ROWS + BLOCK_K - 1) // BLOCK_K
    across = (KERNEL - tap_w + STRIDE - 1) // STRIDE
    for step in range((KERNEL - tap_h + STRIDE - 1) // STRIDE * across * STEPS):
        tap = step // STEPS
        at_h, at_w = tap_h + tap // across * STRIDE, tap_w + tap % across * STRIDE
        out_h, out_w = (h + KERNEL // 2 - at_h) // STRIDE, (w + KERNEL // 2 - at_w) // STRIDE
        inside = valid_p & (h + KERNEL // 2 >= at_h) & (w + KERNEL // 2 >= at_w) & (out_h < H_OUT) & (out_w < W_OUT)
        offs_k = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        valid = inside[:, None] & (offs_k < ROWS)[None, :]
        row = (image * H_OUT + out_h) * W_OUT + out_w
        dy = tl.load(dy_ptr + row[:, None] * stride_dy + (first + offs_k)[None, :], mask=valid, other=0.0)
        taken = weight[None, :] + (at_h * KERNEL + at_w) * ROWS + offs_k[:, None]
        mask = (offs_k < ROWS)[:, None] if EVEN_N else (offs_k < ROWS)[:, None] & valid_n[None, :]
        acc = tl.dot(dy, tl.load(taken, mask=mask, other=0.0), acc, input_precision=PRECISION)
    return acc


@triton.jit(
    do_not_specialize=["P", "H", "W", "OUT_H", "OUT_W", "stride_dy", "stride_g", "stride_raw"]
)  # fmt: skip
def transposed_kernel(
    dy_ptr, weight_ptr, g_ptr, raw_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr,
    d_gamma_ptr, d_beta_ptr, coefficient_ptr, tile_g_ptr, tile_gx_ptr, counter_ptr,
    P, H, W, OUT_H, OUT_W, stride_dy, stride_g, stride_raw, eps,
    C: tl.constexpr, GROUP_IN: tl.constexpr, GROUP_OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BATCH: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g [N·H·W, C] from dy [N·OUT_H·OUT_W, …]; weight [C, taps, GROUP_OUT]. P counts the pixels of one class."""
    stride_dy, stride_g, stride_raw = aligned(stride_dy, ALIGN), aligned(stride_g, ALIGN), aligned(stride_raw, ALIGN)
    EVEN_N: tl.constexpr = C % BLOCK_N == 0
    pid_n = tl.program_id(1)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C
    first = pid_n * BLOCK_N // GROUP_IN * GROUP_OUT
    weight = weight_ptr + offs_n * (GROUP_OUT * KERNEL * KERNEL)
    acc = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    if STRIDE == 1:
        bits = offs_p
        if KERNEL > 1:
            bits = taps_inside((offs_p // W) % H, offs_p % W, mask_p, H, W, KERNEL)
        if WIDE:
            offs_p = offs_p.to(tl.int64)
        acc = conv_product(
            acc, dy_ptr + offs_p * stride_dy + first, bits, mask_p, offs_p, GROUP_OUT, W, stride_dy, weight,
            GROUP_OUT, mask_n, None, 0, KERNEL, True, GROUP_OUT, GROUP_OUT % BLOCK_K == 0, EVEN_N, PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        height, width = (H + STRIDE - 1) // STRIDE, (W + STRIDE - 1) // STRIDE  # of a class
        image = offs_p // (height * width)
        h = (offs_p // width) % height * STRIDE + tl.program_id(2) // STRIDE
        w = offs_p % width * STRIDE + tl.program_id(2) % STRIDE
        mask_p = mask_p & (h < H) & (w < W)
        if WIDE:
            image = image.to(tl.int64)
        acc = strided_product(
            acc, dy_ptr, weight, image, h, w, mask_p, mask_n, OUT_H, OUT_W, stride_dy, first,
            GROUP_OUT, KERNEL, STRIDE, EVEN_N, PRECISION, BLOCK_K,
        )  # fmt: skip
        offs_p = (image * H + h) * W + w
    valid = mask_p[:, None] & mask_n[None, :]
    if raw_ptr is not None:
        finish_gradient(
            acc, g_ptr, stride_g, raw_ptr, stride_raw, gamma_ptr, beta_ptr, mean_ptr, var_ptr, d_gamma_ptr,
            d_beta_ptr, coefficient_ptr, tile_g_ptr, tile_gx_ptr, counter_ptr, offs_p, offs_n, valid, mask_n, C,
            P, eps, BATCH, BLOCK_N, FAN,
        )  # fmt: skip
    else:
        tl.store(g_ptr + offs_p[:, None] * stride_g + offs_n[None, :], acc.to(g_ptr.dtype.element_ty), mask=valid)


@tunable
def transposed(
    dy: Tensor,
    weight: Tensor,
    shape: ConvShape,
    g: Tensor,
    *,
    raw: Tensor | None = None,
    norm: BatchNorm | None = None,
    into: NormGradient | None = None,
    scratch: Scratch | None = None,
    eps: float = 0.0,
    batch: bool = True,
) -> None:
    """g [P_in, C] of a conv of this shape, dy [P_out, c_out], weight [C, taps, c_out of a conv group].

    With `raw` [P_in, C] g goes through the ReLU of its `norm`, whose gradients and coefficients are written `into`;
    `batch` says that norm's statistics were the batch's. That needs stride 1.
    """
    if raw is not None and shape.stride > 1:
        raise ValueError(f"a BN in front of a conv with stride {shape.stride} has no sums here")
    grid, constants = _constants(
        shape, batch, alignment(dy.stride(0), g.stride(0), row_stride(raw)), wide(dy, g, raw), precision(dy.dtype),
        dy.element_size(), architecture(dy.device), pinned(),
    )  # fmt: skip
    gamma, beta, mean, var = norm or BatchNorm(None, None, None, None)
    out = into or NormGradient(None, None, None)
    sums = scratch or Scratch(None, None, None)
    run(
        transposed_kernel, grid,
        dy_ptr=dy, weight_ptr=weight, g_ptr=g, raw_ptr=raw, gamma_ptr=gamma, beta_ptr=beta, mean_ptr=mean, var_ptr=var,
        d_gamma_ptr=out.weight, d_beta_ptr=out.bias, coefficient_ptr=out.coefficients,
        tile_g_ptr=sums.first, tile_gx_ptr=sums.second, counter_ptr=sums.counters,
        P=shape.class_pixels, H=shape.height, W=shape.width, OUT_H=shape.out_height, OUT_W=shape.out_width,
        stride_dy=dy.stride(0), stride_g=g.stride(0), stride_raw=row_stride(raw), eps=eps, **constants,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _constants(
    shape: ConvShape, batch: bool, align: int, wide: bool, precision: str, element_size: int, arch: str, pins: object
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and compile-time constants."""
    channels = shape.total_in
    block_n = channel_tile(channels, shape.group_in)
    config = config_for("transposed", shape.group_out, block_n, element_size, arch, shape.kernel**2)
    return (cdiv(shape.class_pixels, config.block_p), cdiv(channels, block_n), shape.stride**2), dict(
        C=channels, GROUP_IN=shape.group_in, GROUP_OUT=shape.group_out, KERNEL=shape.kernel, STRIDE=shape.stride,
        BATCH=batch, ALIGN=align, WIDE=wide, PRECISION=precision, FAN=FAN,
        BLOCK_P=config.block_p, BLOCK_N=block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

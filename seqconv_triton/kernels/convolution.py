"""Convolution over channels that are ready: y = W ∗ (mask · x) [+ shortcut], and what its BN needs or gives.

One kernel for the 1×1 convs over a window (paper, Eq. 4), the 3×3 convs inside a group, grouped or over the window
(Eq. 2), and the tail. x is activated already, each value once, so that loads go straight into the matrix unit. Where
the BN behind is known, the epilogue stores relu(BN(y)); in training it takes the statistics of its float32
accumulators, which the last program to arrive turns into mean and variance (`statistics.py`). Then the first reader of
a group's channels, a 1×1 conv, activates them and stores them for the others: `Newest`.
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
    ConvShape,
    Scratch,
    alignment,
    cdiv,
    precision,
    row_stride,
    run,
    tunable,
    wide,
)
from seqconv_triton.kernels.statistics import finish_statistics
from seqconv_triton.kernels.tiles import affine, aligned, conv_product, masked_product, rectified, taps_inside


@triton.jit
def newest_product(
    acc, newest_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, x, weight, mask_ptr,
    offs_p, mask_p, mask_n, image, ready, stride_newest, stride_mask, eps,
    NEWEST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + what the newest channels bring, behind the `ready` ones; they are activated and stored in x."""
    # One stage: the left side of a product that is computed must not be overwritten while that is under way.
    for k0 in tl.range(0, NEWEST, BLOCK_K, num_stages=1):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < NEWEST
        valid = mask_p[:, None] & mask_k[None, :]
        raw = tl.load(newest_ptr + offs_p[:, None] * stride_newest + offs_k[None, :], mask=valid, other=0.0)
        scale, shift = affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, offs_k, mask_k, eps)
        value = rectified(raw.to(tl.float32), scale, shift).to(raw.dtype)
        offs_k += ready
        tl.store(x[:, None] + offs_k[None, :], value, mask=valid)
        factor = tl.load(weight[None, :] + offs_k[:, None], mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = masked_product(acc, value, factor, mask_ptr, image, stride_mask, offs_k, valid, PRECISION)
    return acc


@triton.jit(
    do_not_specialize=[
        "start", "c_in", "P", "H", "W", "OUT_H", "OUT_W", "stride_x", "stride_mask", "stride_newest",
        "stride_shortcut", "stride_raw", "stride_activated",
    ]
)  # fmt: skip
def convolution_kernel(
    x_ptr, weight_ptr, mask_ptr, shortcut_ptr, raw_ptr, activated_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr,
    newest_ptr, newest_gamma_ptr, newest_beta_ptr, newest_mean_ptr, newest_var_ptr,
    tile_mean_ptr, tile_m2_ptr, counter_ptr,
    start, c_in, P, H, W, OUT_H, OUT_W,
    stride_x, stride_mask, stride_newest, stride_shortcut, stride_raw, stride_activated, eps,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUP_OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    NEWEST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [P_in, …] from channel `start` on; conv groups of c_in → GROUP_OUT channels, each of whole tiles of BLOCK_N.

    C_IN is c_in, or 0 where dense layers share a kernel. The last NEWEST of the c_in channels are raw and lie at
    `newest`: they are activated here and stored in x. ALIGN divides c_in, offsets and strides.
    """
    start, stride_x, stride_mask = aligned(start, ALIGN), aligned(stride_x, ALIGN), aligned(stride_mask, ALIGN)
    stride_newest, stride_shortcut = aligned(stride_newest, ALIGN), aligned(stride_shortcut, ALIGN)
    stride_raw, stride_activated = aligned(stride_raw, ALIGN), aligned(stride_activated, ALIGN)
    if C_IN > 0:
        reach: tl.constexpr = C_IN
    else:
        reach = aligned(c_in, ALIGN)
    EVEN_N: tl.constexpr = C_OUT % BLOCK_N == 0
    READY: tl.constexpr = C_IN - NEWEST if C_IN > 0 else 0
    EVEN_K: tl.constexpr = READY > 0 and READY % BLOCK_K == 0
    pid_p, pid_n = tl.program_id(0), tl.program_id(1)
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C_OUT

    rows, bits, image = offs_p, offs_p, offs_p
    if mask_ptr is not None or KERNEL > 1 or STRIDE > 1:
        image = offs_p // (OUT_H * OUT_W)
    if KERNEL > 1 or STRIDE > 1:
        h, w = (offs_p // OUT_W) % OUT_H * STRIDE, offs_p % OUT_W * STRIDE
        rows = (image * H + h) * W + w
        bits = taps_inside(h, w, mask_p, H, W, KERNEL)
    if WIDE:
        rows, offs_p, image = rows.to(tl.int64), offs_p.to(tl.int64), image.to(tl.int64)
    first = pid_n * BLOCK_N // GROUP_OUT * reach  # input channel of the tile's conv group
    x = x_ptr + rows * stride_x + start + first  # [BLOCK_P]
    weight = weight_ptr + offs_n * (reach * KERNEL * KERNEL)  # [BLOCK_N]
    if mask_ptr is not None:
        mask_ptr += first

    acc = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    acc = conv_product(
        acc, x, bits, mask_p, image, reach - NEWEST, W, stride_x, weight, reach, mask_n, mask_ptr, stride_mask,
        KERNEL, False, READY, EVEN_K, EVEN_N, PRECISION, BLOCK_K,
    )  # fmt: skip
    if newest_ptr is not None:
        acc = newest_product(
            acc, newest_ptr, newest_gamma_ptr, newest_beta_ptr, newest_mean_ptr, newest_var_ptr, x, weight, mask_ptr,
            offs_p, mask_p, mask_n, image, reach - NEWEST, stride_newest, stride_mask, eps, NEWEST, PRECISION, BLOCK_K,
        )  # fmt: skip

    stored = mask_p[:, None] & mask_n[None, :]
    if shortcut_ptr is not None:
        shortcut = shortcut_ptr + offs_p[:, None] * stride_shortcut + offs_n[None, :]
        acc += tl.load(shortcut, mask=stored, other=0.0).to(tl.float32)
    if raw_ptr is not None:
        raw = acc.to(raw_ptr.dtype.element_ty)
        tl.store(raw_ptr + offs_p[:, None] * stride_raw + offs_n[None, :], raw, mask=stored)
    if activated_ptr is not None:
        scale, shift = affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, offs_n, mask_n, eps)
        value = rectified(acc, scale, shift).to(activated_ptr.dtype.element_ty)
        tl.store(activated_ptr + offs_p[:, None] * stride_activated + offs_n[None, :], value, mask=stored)
    if tile_mean_ptr is not None:
        finish_statistics(
            acc, stored, tile_mean_ptr, tile_m2_ptr, counter_ptr, mean_ptr, var_ptr,
            C_OUT, offs_n, mask_n, P, BLOCK_P, BLOCK_N, FAN,
        )  # fmt: skip


class Newest(NamedTuple):
    """The last channels of a window, raw [P, C] and not activated yet, and their BN."""

    raw: Tensor
    norm: BatchNorm


@tunable
def convolution(
    x: Tensor,
    start: int,
    weight: Tensor,
    shape: ConvShape,
    *,
    raw: Tensor | None = None,
    activated: Tensor | None = None,
    norm: BatchNorm | None = None,
    mask: Tensor | None = None,
    shortcut: Tensor | None = None,
    newest: Newest | None = None,
    scratch: Scratch | None = None,
    eps: float = 0.0,
) -> None:
    """raw [P_out, c_out] = weight ∗ x[:, start:] [+ shortcut], activated = relu(norm(raw)); either may be None.

    x [P_in, …] is activated, weight [c_out, taps, c_in of a conv group]. With `scratch` norm's mean and variance are
    written, those of raw over its pixels, and `activated` must be None.
    """
    new = newest.raw.shape[1] if newest is not None else 0
    grid, constants = _constants(
        shape, new, mask is not None, alignment(
            shape.group_in, start, x.stride(0), row_stride(mask), row_stride(shortcut), row_stride(raw),
            row_stride(activated), 0 if newest is None else newest.raw.stride(0), new,
        ),
        wide(x, mask, shortcut, raw, activated), precision(x.dtype), x.element_size(),
        architecture(x.device), pinned(),
    )  # fmt: skip
    sums = scratch or Scratch(None, None, None)
    gamma, beta, mean, var = norm or BatchNorm(None, None, None, None)
    last = newest.norm if newest is not None else BatchNorm(None, None, None, None)
    run(
        convolution_kernel, grid,
        x_ptr=x, weight_ptr=weight, mask_ptr=mask, shortcut_ptr=shortcut, raw_ptr=raw, activated_ptr=activated,
        gamma_ptr=gamma, beta_ptr=beta, mean_ptr=mean, var_ptr=var,
        newest_ptr=newest.raw if newest is not None else None, newest_gamma_ptr=last.weight, newest_beta_ptr=last.bias,
        newest_mean_ptr=last.mean, newest_var_ptr=last.var,
        tile_mean_ptr=sums.first, tile_m2_ptr=sums.second, counter_ptr=sums.counters,
        start=start, c_in=shape.group_in, P=shape.out_pixels, H=shape.height, W=shape.width,
        OUT_H=shape.out_height, OUT_W=shape.out_width,
        stride_x=x.stride(0), stride_mask=row_stride(mask),
        stride_newest=newest.raw.stride(0) if newest is not None else 0, stride_shortcut=row_stride(shortcut),
        stride_raw=row_stride(raw), stride_activated=row_stride(activated), eps=eps, **constants,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _constants(
    shape: ConvShape,
    newest: int,
    masked: bool,
    align: int,
    wide: bool,
    precision: str,
    element_size: int,
    arch: str,
    pins: object,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and compile-time constants."""
    block_n = channel_tile(shape.c_out, shape.group_out)
    reach = 64 if shape.dense else shape.group_in - newest
    config = config_for("convolution", max(reach, newest), block_n, element_size, arch, shape.kernel**2)
    if masked:  # as for the newest channels
        config = config._replace(num_stages=1)
    return (cdiv(shape.out_pixels, config.block_p), cdiv(shape.c_out, block_n)), dict(
        C_IN=0 if shape.dense else shape.group_in, C_OUT=shape.c_out, GROUP_OUT=shape.group_out,
        KERNEL=shape.kernel, STRIDE=shape.stride, NEWEST=newest, ALIGN=align, WIDE=wide, PRECISION=precision, FAN=FAN,
        BLOCK_P=config.block_p, BLOCK_N=block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

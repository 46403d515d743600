"""Convolution over a channel window, BN-ReLU on load: y = W ∗ (mask · relu(scale·x + shift)) [+ shortcut].

One kernel for the 1×1 convs over a window (paper, Eq. 4), the 3×3 convs of a group, grouped or over the window (Eq. 2),
and the tail. Weights lie as [C_out, taps, C_in of a conv group]. In training it also takes the statistics of its
float32 accumulators, which the last program to arrive turns into the BN behind it (`statistics.py`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.configs import architecture, channel_tile, config_for, pinned
from seqconv_triton.kernels.launch import (
    FAN,
    ConvShape,
    Features,
    Scratch,
    aligned,
    alignment,
    cdiv,
    channel_offset,
    covered,
    precision,
    recorders,
    row_stride,
    run,
    wide,
)
from seqconv_triton.kernels.statistics import finish_statistics


@triton.jit
def activate(value, scale_ptr, shift_ptr, channels, mask_c, IDENTITY: tl.constexpr):
    """relu(scale·value + shift) in float32; the first IDENTITY channels of the buffer are activated already."""
    scale = tl.load(scale_ptr + channels, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + channels, mask=mask_c, other=0.0)
    affine = value * scale[None, :] + shift[None, :]
    positive = tl.where(affine < 0, 0.0, affine)  # keeps a NaN, as torch does
    if IDENTITY > 0:
        positive = tl.where((channels < IDENTITY)[None, :], value, positive)
    return positive


@triton.jit(
    do_not_specialize=[
        "start", "width", "P", "H", "W", "OUT_H", "OUT_W",
        "stride_x", "step_x", "stride_mask", "stride_shortcut", "stride_y", "stride_norm",
    ]
)  # fmt: skip
def convolution_forward_kernel(
    x_ptr, scale_ptr, shift_ptr, mask_ptr, weight_ptr, shortcut_ptr, y_ptr,
    mean_ptr, m2_ptr, counter_ptr, norm_ptr,
    start, width, P, H, W, OUT_H, OUT_W,
    stride_x, step_x, stride_mask, stride_shortcut, stride_y, stride_norm, eps,
    C_OUT: tl.constexpr, GROUP_IN: tl.constexpr, GROUP_OUT: tl.constexpr, READ: tl.constexpr, RANGE: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, IDENTITY: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SHORTCUT: tl.constexpr, STATISTICS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [P_in, …] from channel `start` on; READ of its channels exist (the tail may read them repeatedly).

    RANGE input channels, from the first one of the tile's first conv group on, cover what the tile's outputs see.
    Without a RANGE the conv is one group over a window of `width`. ALIGN divides offsets and strides.
    """
    start, stride_x, step_x = aligned(start, ALIGN), aligned(stride_x, ALIGN), aligned(step_x, ALIGN)
    stride_mask, stride_y = aligned(stride_mask, ALIGN), aligned(stride_y, ALIGN)
    stride_shortcut = aligned(stride_shortcut, ALIGN)
    if RANGE:
        reach: tl.constexpr = RANGE
        group_in: tl.constexpr = GROUP_IN
        total: tl.constexpr = GROUP_IN * (C_OUT // GROUP_OUT)
    else:
        reach = aligned(width, ALIGN)
        group_in = reach
        total = reach
    pid_p, pid_n = tl.program_id(0), tl.program_id(1)
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    mask_p = offs_p < P
    image = offs_p // (OUT_H * OUT_W)
    out_h, out_w = (offs_p // OUT_W) % OUT_H, offs_p % OUT_W
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C_OUT
    first = (pid_n * BLOCK_N // GROUP_OUT) * group_in

    acc = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for tap in range(KERNEL * KERNEL):
        in_h = out_h * STRIDE + tap // KERNEL - KERNEL // 2
        in_w = out_w * STRIDE + tap % KERNEL - KERNEL // 2
        inside = mask_p & (in_h >= 0) & (in_h < H) & (in_w >= 0) & (in_w < W)
        rows = x_ptr + ((image * H + in_h) * W + in_w) * stride_x  # [BLOCK_P]
        for k0 in range(0, reach, BLOCK_K):
            offs_k = first + k0 + tl.arange(0, BLOCK_K)
            mask_k = (k0 + tl.arange(0, BLOCK_K) < reach) & (offs_k < total)
            offs_r = offs_k % READ if READ else offs_k
            channels = start + offs_r
            valid = inside[:, None] & mask_k[None, :]
            x = tl.load(
                rows[:, None] + channel_offset(channels, step_x, BLOCK)[None, :], mask=valid, other=0.0
            )  # [BLOCK_P, BLOCK_K]
            x = activate(x.to(tl.float32), scale_ptr, shift_ptr, channels, mask_k, IDENTITY)
            x = tl.where(valid, x, 0.0)  # the padding is zero behind the activation
            if HAS_MASK:
                dropped = mask_ptr + image[:, None] * stride_mask + offs_r[None, :]
                x *= tl.load(dropped, mask=valid, other=0.0).to(tl.float32)
            # Position within the conv group of each output; outside it the block-diagonal weight is zero.
            inner = offs_k[:, None] - (offs_n // GROUP_OUT)[None, :] * group_in
            held = mask_k[:, None] & mask_n[None, :] & (inner >= 0) & (inner < group_in)
            place = (offs_n[None, :] * (KERNEL * KERNEL) + tap) * group_in + inner
            weight = tl.load(weight_ptr + place, mask=held, other=0.0)  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(x.to(weight.dtype), weight, acc, input_precision=PRECISION)

    stored = mask_p[:, None] & mask_n[None, :]
    if HAS_SHORTCUT:
        shortcut = shortcut_ptr + offs_p[:, None] * stride_shortcut + offs_n[None, :]
        acc += tl.load(shortcut, mask=stored, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_p[:, None] * stride_y + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=stored)
    if STATISTICS:
        count = tl.minimum(P - pid_p * BLOCK_P, BLOCK_P).to(tl.float32)
        mean = tl.sum(tl.where(stored, acc, 0.0), axis=0) / count
        deviation = tl.where(stored, acc - mean[None, :], 0.0)
        finish_statistics(
            mean, tl.sum(deviation * deviation, axis=0), mean_ptr, m2_ptr, counter_ptr, norm_ptr, stride_norm,
            C_OUT, offs_n, mask_n, P, eps, BLOCK_P, BLOCK_N, FAN,
        )  # fmt: skip


def convolution(
    source: Features,
    start: int,
    weight: Tensor,
    shape: ConvShape,
    out: Tensor,
    *,
    mask: Tensor | None = None,
    shortcut: Tensor | None = None,
    norm: Tensor | None = None,
    scratch: Scratch | None = None,
    eps: float = 0.0,
) -> None:
    """out [P_out, c_out] = weight ∗ act(source[:, start:]) [+ shortcut]; with `scratch` also `norm`'s statistics."""
    if recorders.get():
        recorders.get()[-1](convolution, locals())
    grid, constants = _fixed(
        shape, source.identity, source.block, mask is not None, shortcut is not None, scratch is not None,
        alignment(
            shape.c_out, start, shape.read if shape.own_width else 0, source.rows.stride(-2), source.step,
            row_stride(mask), row_stride(shortcut), out.stride(0),
        ),
        wide(source.rows, mask, shortcut, out), precision(out.dtype), out.element_size(),
        architecture(out.device), pinned(),
    )  # fmt: skip
    sums = (source.scale,) * 3 if scratch is None else scratch
    run(
        convolution_forward_kernel, grid,
        source.rows, source.scale, source.shift, source.rows if mask is None else mask, weight,
        source.rows if shortcut is None else shortcut, out, *sums, source.scale if norm is None else norm,
        start, shape.read, shape.out_pixels, shape.height, shape.width, shape.out_height, shape.out_width,
        source.rows.stride(-2), source.step, row_stride(mask), row_stride(shortcut), out.stride(0),
        0 if norm is None else norm.stride(0), eps, **constants,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _fixed(
    shape: ConvShape,
    identity: int,
    block: int,
    has_mask: bool,
    has_shortcut: bool,
    statistics: bool,
    align: int,
    wide: bool,
    precision: str,
    element_size: int,
    arch: str,
    pins: object,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and compile-time constants: derived once, not for every launch."""
    block_n = channel_tile(shape.c_out, shape.group_out)
    reach = covered(block_n, shape.group_out, shape.group_in, shape.c_out, shape.total_in)
    # A window of its own width takes the tile of a long one, so that all such share a kernel.
    config = config_for("convolution", 64 if shape.own_width else reach, block_n, element_size, arch, shape.kernel**2)
    repeated = shape.read < shape.total_in
    return (cdiv(shape.out_pixels, config.block_p), cdiv(shape.c_out, block_n)), dict(
        C_OUT=shape.c_out, GROUP_IN=0 if shape.own_width else shape.group_in, GROUP_OUT=shape.group_out,
        READ=shape.read if repeated else 0, RANGE=0 if shape.own_width else reach,
        KERNEL=shape.kernel, STRIDE=shape.stride, IDENTITY=identity,
        HAS_MASK=has_mask, HAS_SHORTCUT=has_shortcut, STATISTICS=statistics, ALIGN=align,
        BLOCK=block, WIDE=wide, PRECISION=precision, FAN=FAN,
        BLOCK_P=config.block_p, BLOCK_N=block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

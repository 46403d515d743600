"""Weight gradients of all groups of a stage in one launch: dW_i[o, tap, c] = Σ_p dy_i[p, o]·act(x[p @ tap, c]).

A batched matrix product over the pixels, split into SPLITS runs of pixels; the partial sums are added in a fixed order
afterwards, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.configs import architecture, channel_tile, config_for
from seqconv_triton.kernels.convolution import activate
from seqconv_triton.kernels.launch import (
    ConvShape,
    Features,
    Readers,
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


@triton.jit(
    do_not_specialize=[
        "P", "H", "W", "OUT_H", "OUT_W", "share", "size",
        "stride_dy", "step_dy", "stride_x", "step_x", "step_block", "step_scale", "stride_mask",
    ]
)  # fmt: skip
def weight_gradient_kernel(
    dy_ptr, x_ptr, scale_ptr, shift_ptr, mask_ptr, groups_ptr, partial_ptr,
    P, H, W, OUT_H, OUT_W, share, size,
    stride_dy, step_dy, stride_x, step_x, step_block, step_scale, stride_mask,
    ROWS: tl.constexpr, GROUP_IN: tl.constexpr, GROUP_OUT: tl.constexpr, READ: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, IDENTITY: tl.constexpr, TILES_N: tl.constexpr,
    WINDOWS: tl.constexpr, HAS_MASK: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs × tap × tile of inputs, group, split) writes partial[split, weight offset + …].

    A row of `groups` is (start, width, offset of its weight, offset of its mask) as in `data_gradient_kernel`; group
    i's dy and x begin i·step_dy and i·step_x elements on, the affine of its x i·step_scale channels on. ALIGN divides
    offsets, strides and steps.
    """
    stride_dy, step_dy, stride_x = aligned(stride_dy, ALIGN), aligned(step_dy, ALIGN), aligned(stride_x, ALIGN)
    step_x, step_block, stride_mask = aligned(step_x, ALIGN), aligned(step_block, ALIGN), aligned(stride_mask, ALIGN)
    size, step_scale = aligned(size, ALIGN), aligned(step_scale, ALIGN)
    pid, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_n, rest = pid % TILES_N, pid // TILES_N
    tap, tile_m = rest % (KERNEL * KERNEL), rest // (KERNEL * KERNEL)
    start = aligned(tl.load(groups_ptr + group * 4).to(tl.int32), ALIGN)
    width = aligned(tl.load(groups_ptr + group * 4 + 1).to(tl.int32), ALIGN)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < ROWS
    # Inputs of the tile: from the first conv group that its outputs belong to.
    offs_n = (tile_m * BLOCK_M // GROUP_OUT) * GROUP_IN + tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    offs_r = offs_n % READ if READ else offs_n
    channels = start + offs_r

    dy_ptr += tl.cast(group, tl.int64) * step_dy
    x_ptr += tl.cast(group, tl.int64) * step_x
    own = group * step_scale

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for p0 in range(split * share, tl.minimum(split * share + share, P), BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        if WIDE:
            offs_p = offs_p.to(tl.int64)
        mask_p = offs_p < P
        image = offs_p // (OUT_H * OUT_W)
        in_h = ((offs_p // OUT_W) % OUT_H) * STRIDE + tap // KERNEL - KERNEL // 2
        in_w = (offs_p % OUT_W) * STRIDE + tap % KERNEL - KERNEL // 2
        inside = mask_p & (in_h >= 0) & (in_h < H) & (in_w >= 0) & (in_w < W)
        dy = dy_ptr + offs_p[:, None] * stride_dy + offs_m[None, :]
        dy = tl.load(dy, mask=mask_p[:, None] & mask_m[None, :], other=0.0)  # [BLOCK_P, BLOCK_M]
        valid = inside[:, None] & mask_n[None, :]
        x = x_ptr + ((image * H + in_h) * W + in_w)[:, None] * stride_x
        x = tl.load(
            x + channel_offset(channels, step_block, BLOCK)[None, :], mask=valid, other=0.0
        )  # [BLOCK_P, BLOCK_N]
        x = activate(x.to(tl.float32), scale_ptr + own, shift_ptr + own, channels, mask_n, IDENTITY)
        x = tl.where(valid, x, 0.0)
        if HAS_MASK:
            dropped = mask_ptr + aligned(tl.load(groups_ptr + group * 4 + 3), ALIGN)
            dropped += image[:, None] * stride_mask + offs_r[None, :]
            x *= tl.load(dropped, mask=valid, other=0.0).to(tl.float32)
        acc = tl.dot(tl.trans(dy), x.to(dy.dtype), acc, input_precision=PRECISION)

    if WINDOWS:
        inner = offs_n[None, :] + tl.zeros((BLOCK_M, 1), dtype=tl.int32)
        row_length = width
        held = mask_n[None, :]
    else:
        inner = offs_n[None, :] - (offs_m // GROUP_OUT)[:, None] * GROUP_IN
        row_length = GROUP_IN
        held = mask_n[None, :] & (inner >= 0) & (inner < GROUP_IN)
    offset = aligned(tl.load(groups_ptr + group * 4 + 2), ALIGN)
    place = offset + (offs_m[:, None] * (KERNEL * KERNEL) + tap) * row_length + inner
    tl.store(partial_ptr + split.to(tl.int64) * size + place, acc, mask=mask_m[:, None] & held)


def weight_gradient(
    dy: Tensor,
    source: Features,
    shape: ConvShape,
    groups: Readers,
    widest: int,
    windows: bool,
    size: int,
    *,
    own_source: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """The flat float32 gradient [size] of all groups' weights; `shape` is that of the widest group.

    dy [groups, P, c_out]. With `own_source` group i reads source.rows[i], [groups, P, c], with its own part of scale
    and shift; otherwise all read from the same rows, where the row of `groups` says.
    """
    if recorders.get():
        recorders.get()[-1](weight_gradient, locals())
    block_m = channel_tile(shape.c_out, shape.group_out, 64)
    reach = widest if windows else covered(block_m, shape.group_out, shape.group_in, shape.c_out, shape.total_in)
    config = config_for("weight_gradient", reach, block_m, dy.element_size(), architecture(dy.device), shape.kernel**2)
    block_n = config.block_k
    tiles_n = cdiv(reach, block_n)
    programs = cdiv(shape.c_out, block_m) * shape.kernel**2 * tiles_n
    count = len(groups.rows)
    # Enough programs to fill a large GPU, but partial sums of no more than a few times the weights.
    splits = max(1, min(16, 1024 // (programs * count), cdiv(shape.out_pixels, 4 * config.block_p)))
    share = cdiv(cdiv(shape.out_pixels, splits), config.block_p) * config.block_p
    partial = torch.empty((splits, size), dtype=torch.float32, device=dy.device)
    step_x, step_scale = (source.rows.stride(0), source.rows.shape[-1]) if own_source else (0, 0)
    run(
        weight_gradient_kernel, (programs, count, splits),
        dy, source.rows, source.scale, source.shift, source.rows if mask is None else mask, groups.rows, partial,
        shape.out_pixels, shape.height, shape.width, shape.out_height, shape.out_width, share, size,
        dy.stride(-2), dy.stride(0), source.rows.stride(-2), step_x, source.step, step_scale, row_stride(mask),
        ROWS=shape.c_out, GROUP_IN=shape.group_in, GROUP_OUT=shape.group_out,
        READ=shape.read if shape.read < shape.total_in else 0,
        KERNEL=shape.kernel, STRIDE=shape.stride, IDENTITY=source.identity, TILES_N=tiles_n,
        WINDOWS=windows, HAS_MASK=mask is not None,
        ALIGN=alignment(
            groups.align, size, dy.stride(-2), dy.stride(0), source.rows.stride(-2), step_x, source.step, step_scale,
            row_stride(mask),
        ),
        BLOCK=source.block, WIDE=wide(dy, source.rows, mask), PRECISION=precision(dy.dtype),
        BLOCK_P=config.block_p, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partial.sum(0)

"""Weight gradients of all groups of a stage in one launch: dW_i[o, c, tap] = Σ_p dy_i[p, o]·act(x[p + tap, c]).

A batched matrix product over the pixels. With stride 1 its rows are pairs of a tap and an output, which share the
pixels of x: dy[p − tap] needs no activation, so that x is activated once for a whole tile of rows. Groups whose windows
overlap form a band with common columns. With a longer stride the columns are pairs of a tap and a channel instead.
Split into runs of pixels; the partial sums are added in a fixed order afterwards: two runs, same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.configs import architecture, config_for
from seqconv_triton.kernels.heuristic import channel_tile, next_power_of_2, packing_factor
from seqconv_triton.kernels.launch import (
    BatchNorm,
    ConvShape,
    Windows,
    alignment,
    cdiv,
    covered,
    precision,
    row_stride,
    run,
    tunable,
    wide,
)
from seqconv_triton.kernels.tiles import affine, aligned, rectified, rows_to_tap


@triton.jit
def windows_of_rows(
    group, readers_ptr, groups, ROWS: tl.constexpr, TAPS: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """First channel, channels, and where weight and dropout mask begin, of each row's group; the last one's beyond."""
    group = tl.minimum(group, groups - 1)
    if readers_ptr is None:
        return group * ROWS, group * 0 + WINDOW, group * (ROWS * TAPS * WINDOW), group * WINDOW
    else:
        row = readers_ptr + group * 4
        start, width = tl.load(row).to(tl.int32), tl.load(row + 1).to(tl.int32)
        return start, width, tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)


@triton.jit
def weight_places(
    group, output, channels, tap, readers_ptr, groups, band, ROWS: tl.constexpr, TAPS: tl.constexpr,
    WINDOW: tl.constexpr, GROUP_IN: tl.constexpr, GROUP_OUT: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Where the gradient of each row and column goes, in the parameter's own order, and whether it has a weight."""
    if WINDOWS:  # asked for again, rather than kept in registers all the while
        start, width, offset, _ = windows_of_rows(group, readers_ptr, groups, ROWS, TAPS, WINDOW)
        length = width[:, None]
        inside = channels[None, :] - start[:, None]
        place = offset[:, None] + (output[:, None] * length + inside) * TAPS + tap
    else:
        length = GROUP_IN
        inside = channels[None, :] - output[:, None] // GROUP_OUT * GROUP_IN
        place = band * (ROWS * GROUP_IN * TAPS) + (output[:, None] * GROUP_IN + inside) * TAPS + tap
    return place, (inside >= 0) & (inside < length)


@triton.jit
def read_columns(
    x, valid, channels, scale, shift, IDENTITY: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """x [BLOCK_P, BLOCK_N] activated, but for the first IDENTITY channels; padding is zero behind the activation."""
    value = rectified(x.to(tl.float32), scale, shift)
    if IDENTITY > 0:
        value = tl.where((channels < IDENTITY)[None, :], x.to(tl.float32), value)
    if PADDED:
        value = tl.where(valid, value, 0.0)
    return value.to(x.dtype)


@triton.jit(
    do_not_specialize=[
        "P", "W", "pixels", "share", "size", "groups", "stride_dy", "step_dy", "stride_x", "step_x", "step_norm",
        "stride_mask",
    ]
)  # fmt: skip
def weight_gradient_kernel(
    dy_ptr, x_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, mask_ptr, readers_ptr, bits_ptr, rows_ptr, partial_ptr,
    P, W, pixels, share, size, groups, stride_dy, step_dy, stride_x, step_x, step_norm, stride_mask, eps,
    ROWS: tl.constexpr, ROW_TILE: tl.constexpr, BAND: tl.constexpr, GROUP_IN: tl.constexpr, GROUP_OUT: tl.constexpr,
    WINDOW: tl.constexpr, REACH: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, IDENTITY: tl.constexpr,
    TILES_N: tl.constexpr, TILES_M: tl.constexpr, STRETCH: tl.constexpr, WINDOWS: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs, of rows and of columns; band of groups; run of pixels) writes its part of `partial`.

    WINDOWS: group i reads [i·ROWS, i·ROWS + WINDOW) of x, or what row i of `readers` says, and BAND groups share their
    columns. Otherwise it has dy and x of its own, step_dy and step_x apart, and conv groups of GROUP_IN → GROUP_OUT
    channels, of which REACH inputs cover ROW_TILE outputs. ALIGN divides offsets, strides and steps.
    """
    stride_dy, step_dy, stride_x = aligned(stride_dy, ALIGN), aligned(step_dy, ALIGN), aligned(stride_x, ALIGN)
    step_x, stride_mask, step_norm = aligned(step_x, ALIGN), aligned(stride_mask, ALIGN), aligned(step_norm, ALIGN)
    TAPS: tl.constexpr = KERNEL * KERNEL
    pid, band, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_o = pid // (TILES_N * TILES_M)
    offs_m = pid // TILES_N % TILES_M * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    # A row is a tap, a group of the band and an output; a column a tap and a channel. One of the two taps is 0.
    row_tap, inner = offs_m // (BAND * ROW_TILE), offs_m % (BAND * ROW_TILE)
    group, output = band * BAND + inner // ROW_TILE, tile_o * ROW_TILE + inner % ROW_TILE
    mask_m = (row_tap < (TAPS if STRIDE == 1 else 1)) & (group < groups) & (output < ROWS)
    column_tap, column = tl.zeros_like(offs_n), offs_n
    if STRIDE > 1:
        column_tap, column = offs_n // REACH, offs_n % REACH
    if WINDOWS:
        start, width, _, dropped = windows_of_rows(group, readers_ptr, groups, ROWS, TAPS, WINDOW)
        channels = aligned(tl.min(start, axis=0), ALIGN) + column
        mask_n = channels < tl.max(start + width, axis=0)
        if mask_ptr is not None:  # then there is one group a band
            mask_ptr += tl.max(dropped, axis=0) - tl.min(start, axis=0)
    else:
        channels = tile_o * ROW_TILE // GROUP_OUT * GROUP_IN + column
        mask_n = (column < REACH) & (column_tap < TAPS)
        x_ptr += band.to(tl.int64) * step_x
    place_m = group.to(tl.int64) * step_dy + output
    place_n = channels
    if KERNEL > 1 and STRIDE == 1:
        place_m -= rows_to_tap(row_tap, W, KERNEL) * stride_dy
    elif KERNEL > 1:
        place_n += rows_to_tap(column_tap, W, KERNEL) * stride_x
    # dy's pixel lies on the other side of x's. What is beyond the last tap has no bit: any will do.
    row_bit, column_bit = tl.maximum(TAPS - 1 - row_tap, 0), tl.minimum(column_tap, TAPS - 1)
    # What the compiler cannot see through the divisions: neighbours of one tap lie side by side.
    place_m = tl.max_contiguous(tl.multiple_of(place_m, STRETCH), STRETCH)
    place_n = tl.max_contiguous(tl.multiple_of(place_n, STRETCH), STRETCH)
    mask_m, mask_n = tl.max_constancy(mask_m, STRETCH), tl.max_constancy(mask_n, STRETCH)
    behind = channels - IDENTITY + (0 if WINDOWS else band * step_norm)
    scale, shift = affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, behind, mask_n & (channels >= IDENTITY), eps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for p0 in range(split * share, tl.minimum(split * share + share, P), BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        valid_m, valid_n = mask_p[:, None] & mask_m[None, :], mask_p[:, None] & mask_n[None, :]
        if KERNEL > 1:
            bits = tl.load(bits_ptr + offs_p, mask=mask_p, other=0)
            if STRIDE == 1:
                valid_m &= tl.max_constancy(((bits[:, None] >> row_bit[None, :]) & 1) != 0, [1, STRETCH])
            else:
                valid_n &= tl.max_constancy(((bits[:, None] >> column_bit[None, :]) & 1) != 0, [1, STRETCH])
        at = tl.load(rows_ptr + offs_p, mask=mask_p, other=0) if STRIDE > 1 else offs_p
        if WIDE:
            offs_p, at = offs_p.to(tl.int64), at.to(tl.int64)
        dy = tl.load(
            (dy_ptr + place_m)[None, :] + offs_p[:, None] * stride_dy, mask=valid_m, other=0.0
        )  # [BLOCK_P, BLOCK_M]
        x = tl.load((x_ptr + place_n)[None, :] + at[:, None] * stride_x, mask=valid_n, other=0.0)  # [P, N]
        x = read_columns(x, valid_n, channels, scale, shift, IDENTITY, STRIDE > 1)
        if mask_ptr is not None:
            keep = mask_ptr + channels[None, :] + (offs_p // pixels)[:, None] * stride_mask
            x = (x.to(tl.float32) * tl.load(keep, mask=valid_n, other=0.0).to(tl.float32)).to(dy.dtype)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    place, held = weight_places(
        group, output, channels, row_tap[:, None] + column_tap[None, :], readers_ptr, groups, band,
        ROWS, TAPS, WINDOW, GROUP_IN, GROUP_OUT, WINDOWS,
    )  # fmt: skip
    tl.store(partial_ptr + split.to(tl.int64) * size + place, acc, mask=held & mask_m[:, None] & mask_n[None, :])


@tunable
def window_gradient(
    dz: Tensor,
    x: Tensor,
    windows: Windows,
    size: int,
    *,
    norm: BatchNorm,
    identity: int,
    bits: Tensor | None,
    mask: Tensor | None = None,
    eps: float,
) -> Tensor:
    """The flat float32 gradient [size] of the convs over windows, in the order [k, window, taps] of each group.

    dz [groups, P, k], x [P, channels] raw; norm's vectors have an entry for every channel of x, but the first
    `identity` channels are activated already. `bits` [P] is `pixel_table`'s, for 3×3 convs.
    """
    shape, k = windows.shape, dz.shape[2]
    band = 1 if mask is not None else max(1, (128 if shape.kernel == 1 else 32) // k)
    columns = min(windows.most + (band - 1) * k, x.shape[1])
    return _launch(
        dz, x, shape, columns, size, dict(
            ROW_TILE=k, BAND=band, GROUP_IN=0, GROUP_OUT=1, REACH=0, WINDOWS=True, IDENTITY=identity,
            WINDOW=0 if windows.table is not None else windows.channels,
        ),
        norm=norm, mask=mask, readers=windows.table, bits=bits, rows=None, steps=(0, 0), align=windows.align, eps=eps,
    )  # fmt: skip


@tunable
def conv_gradient(
    dy: Tensor,
    x: Tensor,
    shape: ConvShape,
    size: int,
    *,
    norm: BatchNorm,
    identity: int = 0,
    table: tuple[Tensor, Tensor] | None,
    mask: Tensor | None = None,
    eps: float,
) -> Tensor:
    """The flat float32 gradient [size] of convs of one shape, in the order [c_out, c_in of a conv group, taps] of each.

    dy [convs, P_out, c_out]; x [convs, P_in, c_in] raw, norm's vectors one conv's after the other's. `table` is
    `pixel_table`'s, for kernels above 1×1.
    """
    factor = packing_factor(shape.c_out // shape.group_out, shape.group_in, shape.group_out)
    row_tile = channel_tile(shape.c_out, factor * shape.group_out)
    if 1 < factor == shape.c_out // shape.group_out:  # a smaller tile might begin or end inside a conv group
        row_tile = shape.c_out
    reach = covered(row_tile, shape.group_out, shape.group_in, shape.c_out, shape.total_in)
    bits, rows = table or (None, None)
    return _launch(
        dy, x, shape, reach * (1 if shape.stride == 1 else shape.kernel**2), size, dict(
            ROW_TILE=row_tile, BAND=1, GROUP_IN=shape.group_in, GROUP_OUT=shape.group_out, REACH=reach, WINDOWS=False,
            IDENTITY=identity, WINDOW=0,
        ),
        norm=norm, mask=mask, readers=None, bits=bits, rows=rows, steps=(x.stride(0), shape.total_in), align=16,
        eps=eps,
    )  # fmt: skip


def _launch(
    dy: Tensor, x: Tensor, shape: ConvShape, columns: int, size: int, constants: dict[str, Any], *,
    norm: BatchNorm, mask: Tensor | None, readers: Tensor | None, bits: Tensor | None, rows: Tensor | None,
    steps: tuple[int, int], align: int, eps: float,
) -> Tensor:  # fmt: skip
    band, taps = constants["BAND"], shape.kernel**2
    pairs = (taps if shape.stride == 1 else 1) * band * constants["ROW_TILE"]
    block_m = max(16, min(128, next_power_of_2(pairs)))
    config = config_for("weight_gradient", columns, block_m, dy.element_size(), architecture(dy.device), taps)
    tiles_m, tiles_n = cdiv(pairs, block_m), cdiv(columns, config.block_k)
    programs, bands = cdiv(shape.c_out, constants["ROW_TILE"]) * tiles_m * tiles_n, cdiv(len(dy), band)
    # Enough programs to fill a large GPU, each with pixels enough to pay for its sums.
    splits = max(1, min(64, 1056 // (programs * bands), shape.out_pixels // (8 * config.block_p)))
    share = cdiv(cdiv(shape.out_pixels, splits), config.block_p) * config.block_p
    align = alignment(align, dy.stride(1), dy.stride(0), x.stride(-2), *steps, row_stride(mask))
    stretch = alignment(align, constants["ROW_TILE"], constants["REACH"], constants["GROUP_IN"], shape.c_out)
    partial = torch.empty((splits, size), dtype=torch.float32, device=dy.device)
    run(
        weight_gradient_kernel, (programs, bands, splits),
        dy_ptr=dy, x_ptr=x, gamma_ptr=norm.weight, beta_ptr=norm.bias, mean_ptr=norm.mean, var_ptr=norm.var,
        mask_ptr=mask, readers_ptr=readers, bits_ptr=bits, rows_ptr=rows, partial_ptr=partial,
        P=shape.out_pixels, W=shape.width, pixels=shape.out_height * shape.out_width, share=share, size=size,
        groups=len(dy), stride_dy=dy.stride(1), step_dy=dy.stride(0), stride_x=x.stride(-2), step_x=steps[0],
        step_norm=steps[1], stride_mask=row_stride(mask), eps=eps,
        ROWS=shape.c_out, KERNEL=shape.kernel, STRIDE=shape.stride, TILES_N=tiles_n, TILES_M=tiles_m,
        STRETCH=stretch,
        ALIGN=align, WIDE=wide(dy, x, mask), PRECISION=precision(dy.dtype),
        BLOCK_P=config.block_p, BLOCK_M=block_m, BLOCK_N=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, **constants,
    )  # fmt: skip
    return partial.sum(0)

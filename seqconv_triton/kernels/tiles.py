"""What the conv kernels share: which taps lie inside the image, BN as scale and shift, and the product over taps.

A conv is an implicit GEMM over operands that are ready: x [P, C] activated, weights [C_out, taps, C_in]. Tap t of pixel
p lies `(t // K − K // 2)·W + t % K − K // 2` rows further on; a bit a tap, computed once, says whether it is inside.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """`value`, a multiple of ALIGN, as one that the compiler knows to be a multiple: only then are loads wide."""
    return value // ALIGN * ALIGN


@triton.jit
def taps_inside(h, w, valid, H, W, KERNEL: tl.constexpr):
    """One bit a tap, row by row: whether the pixel that it reads for the pixel at (h, w) lies in the image."""
    across = tl.zeros_like(h)
    for tap in tl.static_range(KERNEL):
        at = w + tap - KERNEL // 2
        across |= ((at >= 0) & (at < W)).to(tl.int32) << tap
    bits = tl.zeros_like(h)
    for tap in tl.static_range(KERNEL):
        at = h + tap - KERNEL // 2
        bits |= tl.where((at >= 0) & (at < H), across, 0) << (tap * KERNEL)
    return tl.where(valid, bits, 0)


@triton.jit
def rows_to_tap(tap, W, KERNEL: tl.constexpr):
    """How many rows further on a tap's pixel lies."""
    return (tap // KERNEL - KERNEL // 2) * W + tap % KERNEL - KERNEL // 2


@triton.jit
def affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, channels, mask, eps):
    """BN as scale·x + shift, float32; without statistics gamma and beta are that already."""
    scale = tl.load(gamma_ptr + channels, mask=mask, other=0.0)
    shift = tl.load(beta_ptr + channels, mask=mask, other=0.0)
    if mean_ptr is not None:
        scale = scale / tl.sqrt(tl.load(var_ptr + channels, mask=mask, other=1.0) + eps)
        shift -= scale * tl.load(mean_ptr + channels, mask=mask, other=0.0)
    return scale, shift


@triton.jit
def rectified(value, scale, shift):
    """relu(scale·value + shift) over the columns of a tile; a NaN stays one, as in PyTorch."""
    return tl.maximum(value * scale[None, :] + shift[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def masked_product(acc, x, weight, mask_ptr, image, stride_mask, offs_k, valid, PRECISION: tl.constexpr):
    """acc + x·weight, x [BLOCK_P, BLOCK_K] multiplied by the dropout mask of its image if there is one."""
    if mask_ptr is not None:
        dropped = tl.load(mask_ptr + image[:, None] * stride_mask + offs_k[None, :], mask=valid, other=0.0)
        x = (x.to(tl.float32) * dropped.to(tl.float32)).to(x.dtype)
    return tl.dot(x, weight, acc, input_precision=PRECISION)


@triton.jit
def step_product(
    acc, x, bits, valid_p, image, tap, k0, reach, W, stride_x, weight, row_length, valid_n, mask_ptr, stride_mask,
    KERNEL: tl.constexpr, MIRRORED: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step of a conv: BLOCK_K input channels, from k0 on, of one tap."""
    offs_k = k0 + tl.arange(0, BLOCK_K)
    valid_k = offs_k < reach
    if KERNEL > 1:
        x += rows_to_tap(tap, W, KERNEL) * stride_x
        valid_p = ((bits >> tap) & 1) != 0
    if MIRRORED:  # the weight, not the pixel: a bit below the first, in a copy that the last step skips, is undefined
        tap = KERNEL * KERNEL - 1 - tap
    valid = valid_p[:, None] if EVEN_K else valid_p[:, None] & valid_k[None, :]
    value = tl.load(x[:, None] + offs_k[None, :], mask=valid, other=0.0)  # [BLOCK_P, BLOCK_K]
    taken = weight[None, :] + tap * row_length + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    if EVEN_K and EVEN_N:
        factor = tl.load(taken)
    elif EVEN_N:
        factor = tl.load(taken, mask=valid_k[:, None], other=0.0)
    else:
        factor = tl.load(taken, mask=valid_k[:, None] & valid_n[None, :], other=0.0)
    return masked_product(acc, value, factor, mask_ptr, image, stride_mask, offs_k, valid, PRECISION)


@triton.jit
def conv_product(
    acc, x, bits, valid_p, image, reach, W, stride_x, weight, row_length, valid_n, mask_ptr, stride_mask,
    KERNEL: tl.constexpr, MIRRORED: tl.constexpr, C_IN: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + the conv over all taps and `reach` channels; x and weight point to the rows of the tile.

    C_IN is `reach` where that is known when compiling (else 0): then one pipelined loop goes through all steps.
    """
    if C_IN > 0:
        STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
        for step in range(STEPS * KERNEL * KERNEL):
            acc = step_product(
                acc, x, bits, valid_p, image, step // STEPS, step % STEPS * BLOCK_K, C_IN, W, stride_x, weight,
                row_length, valid_n, mask_ptr, stride_mask, KERNEL, MIRRORED, EVEN_K, EVEN_N, PRECISION, BLOCK_K,
            )  # fmt: skip
    else:
        for tap in range(KERNEL * KERNEL):
            for k0 in range(0, reach, BLOCK_K):
                acc = step_product(
                    acc, x, bits, valid_p, image, tap, k0, reach, W, stride_x, weight, row_length, valid_n,
                    mask_ptr, stride_mask, KERNEL, MIRRORED, EVEN_K, EVEN_N, PRECISION, BLOCK_K,
                )  # fmt: skip
    return acc

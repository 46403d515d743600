"""Which neighbours of a pixel lie inside its image, as a table for loops over pixels, which then hold no division."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.launch import ConvShape, cdiv, run
from seqconv_triton.kernels.tiles import taps_inside


@triton.jit(do_not_specialize=["P", "H", "W", "OUT_H", "OUT_W"])
def pixel_table_kernel(
    bits_ptr, rows_ptr, P, H, W, OUT_H, OUT_W, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """For every output pixel: a bit a tap, whether it is inside, and the row that the middle tap reads."""
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    h, w = (offs_p // OUT_W) % OUT_H * STRIDE, offs_p % OUT_W * STRIDE
    tl.store(bits_ptr + offs_p, taps_inside(h, w, mask_p, H, W, KERNEL), mask=mask_p)
    tl.store(rows_ptr + offs_p, (offs_p // (OUT_H * OUT_W) * H + h) * W + w, mask=mask_p)


def pixel_table(shape: ConvShape, like: Tensor) -> tuple[Tensor, Tensor]:
    """(bits, rows), int32 [P_out] each: a bit a tap, and the row of the input that the middle tap reads."""
    pixels = shape.out_pixels
    # Two tensors, so that both are aligned whatever their length: else their readers would be compiled twice.
    bits, rows = (torch.empty(pixels, dtype=torch.int32, device=like.device) for _ in range(2))
    run(
        pixel_table_kernel, (cdiv(pixels, 256),),
        bits_ptr=bits, rows_ptr=rows, P=pixels, H=shape.height, W=shape.width, OUT_H=shape.out_height,
        OUT_W=shape.out_width, KERNEL=shape.kernel, STRIDE=shape.stride, BLOCK_P=256,
    )  # fmt: skip
    return bits, rows

"""What is left for a launch of its own, once a stage: BN's backward at the stage's input, and a layer's output."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.launch import A, cdiv, run, wide
from seqconv_triton.kernels.statistics import ELEMENTWISE_C, ELEMENTWISE_P


@triton.jit(do_not_specialize=["P"])
def apply_gradient_kernel(
    g_ptr, x_ptr, coefficient_ptr, upstream_ptr, passed_ptr, dx_ptr,
    P, CHANNELS, stride_g, stride_x, stride_coefficient, stride_upstream, stride_passed, stride_dx,
    HAS_UPSTREAM: tl.constexpr, HAS_PASSED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = a·g + b·x + c, plus what reaches the raw features directly: from outside, and through a shortcut."""
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    valid = (offs_p < P)[:, None] & mask_c[None, :]
    a = tl.load(coefficient_ptr + offs_c, mask=mask_c, other=0.0)
    b = tl.load(coefficient_ptr + stride_coefficient + offs_c, mask=mask_c, other=0.0)
    c = tl.load(coefficient_ptr + 2 * stride_coefficient + offs_c, mask=mask_c, other=0.0)
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


@triton.jit(do_not_specialize=["P"])
def activate_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, P, CHANNELS, stride_x, stride_y,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = relu(scale·x + shift): what a layer without a tail gives."""
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    valid = (offs_p < P)[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs_p[:, None] * stride_x + offs_c[None, :], mask=valid, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
    y = x * scale[None, :] + shift[None, :]
    y = tl.where(y < 0, 0.0, y)
    tl.store(y_ptr + offs_p[:, None] * stride_y + offs_c[None, :], y.to(y_ptr.dtype.element_ty), mask=valid)


def apply_gradient(
    g: Tensor, x: Tensor, norm: Tensor, out: Tensor, upstream: Tensor | None = None, passed: Tensor | None = None
) -> None:
    """out = a·g + b·x + c [+ upstream] [+ passed], all [P, C]; a, b, c are rows of norm. `out` may be `g`."""
    pixels, channels = g.shape
    run(
        apply_gradient_kernel, (cdiv(pixels, ELEMENTWISE_P), cdiv(channels, ELEMENTWISE_C)),
        g, x, norm[A], g if upstream is None else upstream, g if passed is None else passed, out,
        pixels, channels, g.stride(0), x.stride(0), norm.stride(0), 0 if upstream is None else upstream.stride(0),
        0 if passed is None else passed.stride(0), out.stride(0),
        HAS_UPSTREAM=upstream is not None, HAS_PASSED=passed is not None, WIDE=wide(g, x, out),
        BLOCK_P=ELEMENTWISE_P, BLOCK_C=ELEMENTWISE_C,
    )  # fmt: skip


def activate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = relu(scale·x + shift), [P, C]."""
    pixels, channels = x.shape
    run(
        activate_kernel, (cdiv(pixels, ELEMENTWISE_P), cdiv(channels, ELEMENTWISE_C)),
        x, scale, shift, out, pixels, channels, x.stride(0), out.stride(0),
        WIDE=wide(x, out), BLOCK_P=ELEMENTWISE_P, BLOCK_C=ELEMENTWISE_C,
    )  # fmt: skip

"""What needs a launch of its own because nine taps or many readers follow: activation, and BN's backward in place.

Both go over [P, C] once, eight channels a thread at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.heuristic import next_power_of_2
from seqconv_triton.kernels.launch import BatchNorm, alignment, cdiv, row_stride, run, wide
from seqconv_triton.kernels.tiles import affine, aligned, rectified

TILE = 8192  # elements


@triton.jit(do_not_specialize=["P", "stride_x", "stride_y", "stride_copy"])
def activate_kernel(
    x_ptr, y_ptr, copy_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, P, stride_x, stride_y, stride_copy, eps,
    CHANNELS: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = relu(BN(x)), or x where there is no BN; x itself goes to `copy`."""
    stride_x, stride_y, stride_copy = aligned(stride_x, ALIGN), aligned(stride_y, ALIGN), aligned(stride_copy, ALIGN)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    valid = mask_p[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs_p[:, None] * stride_x + offs_c[None, :], mask=valid, other=0.0)
    if copy_ptr is not None:
        tl.store(copy_ptr + offs_p[:, None] * stride_copy + offs_c[None, :], x, mask=valid)
    if y_ptr is not None:
        y = x
        if gamma_ptr is not None:
            scale, shift = affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps)
            y = rectified(x.to(tl.float32), scale, shift).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_p[:, None] * stride_y + offs_c[None, :], y, mask=valid)


def tile(channels: int) -> tuple[int, int]:
    """Pixels and channels of a program."""
    block_c = min(128, next_power_of_2(channels))
    return TILE // max(16, block_c) // 2, block_c


def activate(x: Tensor, y: Tensor | None, norm: BatchNorm | None, eps: float, copy: Tensor | None = None) -> None:
    """y = relu(norm(x)), all [P, C]; without norm y = x. `copy` becomes x."""
    pixels, channels = x.shape
    block_p, block_c = tile(channels)
    gamma, beta, mean, var = norm or BatchNorm(None, None, None, None)
    run(
        activate_kernel, (cdiv(pixels, block_p), cdiv(channels, block_c)),
        x_ptr=x, y_ptr=y, copy_ptr=copy, gamma_ptr=gamma, beta_ptr=beta, mean_ptr=mean, var_ptr=var,
        P=pixels, stride_x=x.stride(0), stride_y=row_stride(y), stride_copy=row_stride(copy), eps=eps,
        CHANNELS=channels, ALIGN=alignment(x.stride(0), row_stride(y), row_stride(copy)), WIDE=wide(x, y, copy),
        BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["P", "stride_g", "stride_x", "stride_upstream", "stride_passed", "step_passed", "stride_dx"]
)  # fmt: skip
def norm_gradient_kernel(
    g_ptr, x_ptr, coefficient_ptr, upstream_ptr, passed_ptr, dx_ptr,
    P, stride_g, stride_x, stride_upstream, stride_passed, step_passed, stride_dx,
    CHANNELS: tl.constexpr, PASSED: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = a·g + b·x + c + upstream + passed; `passed` lies in blocks of PASSED channels, step_passed apart."""
    stride_g, stride_x, stride_dx = aligned(stride_g, ALIGN), aligned(stride_x, ALIGN), aligned(stride_dx, ALIGN)
    stride_upstream, stride_passed = aligned(stride_upstream, ALIGN), aligned(stride_passed, ALIGN)
    step_passed = aligned(step_passed, ALIGN)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    valid = mask_p[:, None] & mask_c[None, :]
    dx = tl.load(g_ptr + offs_p[:, None] * stride_g + offs_c[None, :], mask=valid, other=0.0).to(tl.float32)
    if coefficient_ptr is not None:
        x = tl.load(x_ptr + offs_p[:, None] * stride_x + offs_c[None, :], mask=valid, other=0.0).to(tl.float32)
        a = tl.load(coefficient_ptr + offs_c, mask=mask_c, other=0.0)
        b = tl.load(coefficient_ptr + CHANNELS + offs_c, mask=mask_c, other=0.0)
        c = tl.load(coefficient_ptr + 2 * CHANNELS + offs_c, mask=mask_c, other=0.0)
        dx = a[None, :] * dx + b[None, :] * x + c[None, :]
    if upstream_ptr is not None:
        upstream = upstream_ptr + offs_p[:, None] * stride_upstream + offs_c[None, :]
        dx += tl.load(upstream, mask=valid, other=0.0).to(tl.float32)
    if passed_ptr is not None:
        block = (offs_c // PASSED).to(tl.int64) * step_passed + offs_c % PASSED
        passed = passed_ptr + offs_p[:, None] * stride_passed + block[None, :]
        dx += tl.load(passed, mask=valid, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offs_p[:, None] * stride_dx + offs_c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=valid)


def norm_gradient(
    g: Tensor,
    x: Tensor | None,
    coefficients: Tensor | None,
    dx: Tensor,
    *,
    upstream: Tensor | None = None,
    passed: Tensor | None = None,
) -> None:
    """dx [P, C] = a·g + b·x + c [+ upstream] [+ passed]; coefficients [3, C], without them a = 1.

    `passed` is [blocks, P, C / blocks]. `dx` may be `g`.
    """
    pixels, channels = g.shape
    block_p, block_c = tile(channels)
    steps = (row_stride(passed), 0 if passed is None else passed.stride(0))
    run(
        norm_gradient_kernel, (cdiv(pixels, block_p), cdiv(channels, block_c)),
        g_ptr=g, x_ptr=x, coefficient_ptr=coefficients, upstream_ptr=upstream, passed_ptr=passed, dx_ptr=dx,
        P=pixels, stride_g=g.stride(0), stride_x=row_stride(x), stride_upstream=row_stride(upstream),
        stride_passed=steps[0], step_passed=steps[1], stride_dx=dx.stride(0),
        CHANNELS=channels, PASSED=channels if passed is None else passed.shape[2],
        ALIGN=alignment(g.stride(0), row_stride(x), row_stride(upstream), *steps, dx.stride(0)),
        WIDE=wide(g, x, dx, upstream, passed), BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip

"""Launchers: tensors in, kernel launched. They decide nothing about mathematics; `configs.py` decides the tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqconv_triton.kernels.configs import channel_tile, config_for
from seqconv_triton.kernels.convolution import convolution_forward_kernel
from seqconv_triton.kernels.data_gradient import data_gradient_kernel
from seqconv_triton.kernels.statistics import (
    activate_kernel,
    apply_gradient_kernel,
    combine_gradients_kernel,
    combine_statistics_kernel,
    tile_statistics_kernel,
)
from seqconv_triton.kernels.weight_gradient import weight_gradient_kernel

INTERPRETED = not isinstance(convolution_forward_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: runs on a CPU
ELEMENTWISE_P, ELEMENTWISE_C, TILES_AT_ONCE = 64, 64, 64


@dataclass(frozen=True)
class ConvShape:
    """A conv on [batch, ·, height, width]: conv groups of group_in → group_out channels over `read` stored channels."""

    batch: int
    height: int
    width: int
    kernel: int
    stride: int
    c_out: int
    group_in: int
    group_out: int
    read: int

    @property
    def out_height(self) -> int:
        return (self.height - 1) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width - 1) // self.stride + 1

    @property
    def in_pixels(self) -> int:
        return self.batch * self.height * self.width

    @property
    def out_pixels(self) -> int:
        return self.batch * self.out_height * self.out_width

    @property
    def total_in(self) -> int:
        return self.group_in * (self.c_out // self.group_out)


_listener: Callable[..., None] | None = None


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel, or tell a listener of it (`ahead.py` compiles what it hears of)."""
    if _listener is None:
        kernel[grid](*arguments, **constants)
    else:
        _listener(kernel, arguments, constants)


@contextmanager
def listen(listener: Callable[..., None]) -> Iterator[None]:
    """Inside, nothing is launched: `listener(kernel, arguments, constants)` hears of every launch instead."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


class Features(NamedTuple):
    """Stored features [P, …] and how a reader activates them: relu(scale·v + shift), but for the first `identity`."""

    rows: Tensor
    scale: Tensor
    shift: Tensor
    identity: int = 0


class Norm(NamedTuple):
    """One BN's vectors, float32: affine, statistics, and both folded."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    scale: Tensor
    shift: Tensor


def precision(dtype: torch.dtype) -> str:
    """TF32 only where torch's own switches allow it."""
    allowed = torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def wide(*tensors: Tensor) -> bool:
    """Whether an element's offset may need 64 bits."""
    return any(t.untyped_storage().nbytes() // t.element_size() >= 2**31 for t in tensors)


def covered(tile: int, group: int, other: int, channels: int, total: int) -> int:
    """Channels on the other side of a grouped conv that a tile of `tile` out of `channels` is connected to."""
    if tile >= channels:
        return total
    return max(1, tile // group) * other


def convolution(
    source: Features,
    start: int,
    weight: Tensor,
    shape: ConvShape,
    out: Tensor,
    *,
    mask: Tensor | None = None,
    shortcut: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> int:
    """out [P_out, c_out] = weight ∗ act(source[:, start:]) [+ shortcut]; returns the pixels of a statistics tile."""
    block_n = channel_tile(shape.c_out, shape.group_out)
    reach = covered(block_n, shape.group_out, shape.group_in, shape.c_out, shape.total_in)
    config = config_for("convolution", reach, block_n, out.element_size())
    mean, m2 = statistics or (source.scale, source.scale)
    run(
        convolution_forward_kernel, (triton.cdiv(shape.out_pixels, config.block_p), triton.cdiv(shape.c_out, block_n)),
        source.rows, source.scale, source.shift, source.rows if mask is None else mask, weight,
        source.rows if shortcut is None else shortcut, out, mean, m2,
        start, shape.out_pixels, shape.height, shape.width, shape.out_height, shape.out_width,
        source.rows.stride(0), 0 if mask is None else mask.stride(0),
        0 if shortcut is None else shortcut.stride(0), out.stride(0),
        C_OUT=shape.c_out, GROUP_IN=shape.group_in, GROUP_OUT=shape.group_out, READ=shape.read, RANGE=reach,
        KERNEL=shape.kernel, STRIDE=shape.stride, IDENTITY=source.identity,
        ACTIVATE=True, HAS_MASK=mask is not None, HAS_SHORTCUT=shortcut is not None,
        STATISTICS=statistics is not None, WIDE=wide(source.rows, out), PRECISION=precision(out.dtype),
        BLOCK_P=config.block_p, BLOCK_N=block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return config.block_p


def tile_statistics(x: Tensor, statistics: tuple[Tensor, Tensor]) -> int:
    """Tile statistics of x [P, C]; returns the pixels of a tile."""
    pixels, channels = x.shape
    run(
        tile_statistics_kernel, (triton.cdiv(pixels, ELEMENTWISE_P), triton.cdiv(channels, ELEMENTWISE_C)),
        x, *statistics, pixels, channels, x.stride(0),
        WIDE=wide(x), BLOCK_P=ELEMENTWISE_P, BLOCK_C=ELEMENTWISE_C,
    )  # fmt: skip
    return ELEMENTWISE_P


def combine_statistics(statistics: tuple[Tensor, Tensor], norm: Norm, pixels: int, tile: int, eps: float) -> None:
    """Fill norm.mean, var, scale and shift."""
    channels = norm.mean.shape[0]
    run(
        combine_statistics_kernel, (triton.cdiv(channels, 16),),
        *statistics, norm.weight, norm.bias, norm.mean, norm.var, norm.scale, norm.shift,
        pixels, channels, triton.cdiv(pixels, tile), eps,
        TILE=tile, BLOCK_T=TILES_AT_ONCE, BLOCK_C=16,
    )  # fmt: skip


def data_gradient(
    dy: Tensor,
    step: int,
    weight: Tensor,
    shape: ConvShape,
    readers: Tensor,
    span: tuple[int, int],
    target: int,
    channels: int,
    windows: bool,
    out: Tensor,
    eps: float,
    *,
    mask: Tensor | None = None,
    upstream: Tensor | None = None,
    norm: Norm | None = None,
    raw: Tensor | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
) -> int:
    """out [P_in, channels]: gradient of channels [target, …), through its norm's ReLU if given; returns the tile."""
    if windows:
        block_n, reach = channel_tile(channels, channels), shape.c_out
    else:
        block_n = channel_tile(shape.read, shape.group_in)
        reach = covered(block_n, shape.group_in, shape.group_out, shape.read, shape.c_out)
    config = config_for("data_gradient", reach, block_n, out.element_size())
    tile_g, tile_gx = sums or (out, out)
    vectors = (out,) * 4 if norm is None else (norm.scale, norm.shift, norm.mean, norm.var)
    run(
        data_gradient_kernel, (triton.cdiv(shape.in_pixels, config.block_p), triton.cdiv(channels, block_n)),
        dy, weight, readers, dy if mask is None else mask, dy if upstream is None else upstream,
        out if raw is None else raw, *vectors, out, tile_g, tile_gx,
        span[0], span[1], target, shape.in_pixels, shape.height, shape.width, shape.out_height, shape.out_width, eps,
        dy.stride(-2), step, 0 if mask is None else mask.stride(0), 0 if upstream is None else upstream.stride(0),
        0 if raw is None else raw.stride(0), out.stride(0),
        C=channels, ROWS=shape.c_out, GROUP_IN=shape.group_in, GROUP_OUT=shape.group_out, RANGE=reach,
        KERNEL=shape.kernel, STRIDE=shape.stride, WINDOWS=windows, HAS_MASK=mask is not None,
        HAS_UPSTREAM=upstream is not None, NORM=norm is not None,
        WIDE=wide(dy, out, *(() if raw is None else (raw,))), PRECISION=precision(out.dtype),
        BLOCK_P=config.block_p, BLOCK_N=block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return config.block_p


def combine_gradients(
    sums: tuple[Tensor, Tensor], norm: Norm, d_weight: Tensor, d_bias: Tensor, coefficients: Tensor,
    pixels: int, tile: int, batch: bool, eps: float,
) -> None:  # fmt: skip
    """Fill d_weight, d_bias and the coefficients [3, C] of BN's backward."""
    channels = norm.mean.shape[0]
    run(
        combine_gradients_kernel, (triton.cdiv(channels, 16),),
        *sums, norm.weight, norm.mean, norm.var, d_weight, d_bias, coefficients,
        pixels, channels, triton.cdiv(pixels, tile), eps,
        BATCH=batch, BLOCK_T=TILES_AT_ONCE, BLOCK_C=16,
    )  # fmt: skip


def apply_gradient(
    g: Tensor,
    x: Tensor,
    coefficients: Tensor,
    out: Tensor,
    upstream: Tensor | None = None,
    passed: Tensor | None = None,
) -> None:
    """out = a·g + b·x + c [+ upstream] [+ passed], all [P, C]."""
    pixels, channels = g.shape
    run(
        apply_gradient_kernel, (triton.cdiv(pixels, ELEMENTWISE_P), triton.cdiv(channels, ELEMENTWISE_C)),
        g, x, coefficients, g if upstream is None else upstream, g if passed is None else passed, out,
        pixels, channels, g.stride(0), x.stride(0), 0 if upstream is None else upstream.stride(0),
        0 if passed is None else passed.stride(0), out.stride(0),
        HAS_UPSTREAM=upstream is not None, HAS_PASSED=passed is not None, WIDE=wide(g, x, out),
        BLOCK_P=ELEMENTWISE_P, BLOCK_C=ELEMENTWISE_C,
    )  # fmt: skip


def activate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = relu(scale·x + shift), [P, C]."""
    pixels, channels = x.shape
    run(
        activate_kernel, (triton.cdiv(pixels, ELEMENTWISE_P), triton.cdiv(channels, ELEMENTWISE_C)),
        x, scale, shift, out, pixels, channels, x.stride(0), out.stride(0),
        WIDE=wide(x, out), BLOCK_P=ELEMENTWISE_P, BLOCK_C=ELEMENTWISE_C,
    )  # fmt: skip


def weight_gradient(
    dy: Tensor,
    step_dy: int,
    source: Features,
    step_x: int,
    step_scale: int,
    shape: ConvShape,
    groups: Tensor,
    widest: int,
    windows: bool,
    size: int,
    mask: Tensor | None = None,
) -> Tensor:
    """The flat float32 gradient [size] of all groups' weights; `shape` is that of the widest group."""
    block_m = channel_tile(shape.c_out, shape.group_out, 64)
    reach = widest if windows else covered(block_m, shape.group_out, shape.group_in, shape.c_out, shape.total_in)
    config = config_for("weight_gradient", reach, block_m, dy.element_size())
    block_n = config.block_k
    tiles_n = triton.cdiv(reach, block_n)
    programs = triton.cdiv(shape.c_out, block_m) * shape.kernel**2 * tiles_n
    count = groups.shape[0]
    # Enough programs to fill a large GPU, but partial sums of no more than a few times the weights.
    splits = max(1, min(16, 1024 // (programs * count), triton.cdiv(shape.out_pixels, 4 * config.block_p)))
    share = triton.cdiv(triton.cdiv(shape.out_pixels, splits), config.block_p) * config.block_p
    partial = torch.empty((splits, size), dtype=torch.float32, device=dy.device)
    run(
        weight_gradient_kernel, (programs, count, splits),
        dy, source.rows, source.scale, source.shift, source.rows if mask is None else mask, groups, partial,
        shape.out_pixels, shape.height, shape.width, shape.out_height, shape.out_width, share, size,
        dy.stride(-2), step_dy, source.rows.stride(-2), step_x, step_scale, 0 if mask is None else mask.stride(0),
        ROWS=shape.c_out, GROUP_IN=shape.group_in, GROUP_OUT=shape.group_out, READ=shape.read,
        KERNEL=shape.kernel, STRIDE=shape.stride, IDENTITY=source.identity, TILES_N=tiles_n,
        WINDOWS=windows, ACTIVATE=True, HAS_MASK=mask is not None, WIDE=wide(dy, source.rows),
        PRECISION=precision(dy.dtype), BLOCK_P=config.block_p, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partial.sum(0)

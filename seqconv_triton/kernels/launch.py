"""What all launchers share: the shape of a conv, stored features and their BN, scratch memory, the launch itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqconv_triton.kernels.configs import architecture, smallest_tile


@triton.jit
def channel_offset(channels, step, BLOCK: tl.constexpr):
    """Where channels lie in a pixel's row: side by side (BLOCK 0), or in groups of BLOCK that are `step` apart."""
    if BLOCK == 0:
        return channels
    else:
        return (channels // BLOCK).to(tl.int64) * step + channels % BLOCK


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """`value`, a multiple of ALIGN, as one that the compiler knows to be a multiple: only then are loads wide."""
    return value // ALIGN * ALIGN


INTERPRETED = not isinstance(channel_offset, triton.JITFunction)  # TRITON_INTERPRET=1: runs on a CPU
FAN = 32  # tiles whose sums the last of them to arrive adds up; then the last of those adds up the rest

# Rows of a BN's vectors; those from D_WEIGHT on exist in backward only.
WEIGHT, BIAS, MEAN, VAR, SCALE, SHIFT, D_WEIGHT, D_BIAS, A, B, C = range(11)
FORWARD_ROWS, BACKWARD_ROWS = 6, 11


class ConvShape(NamedTuple):
    """A conv on [batch, ·, height, width]: conv groups of group_in → group_out channels over `read` stored channels.

    `own_width` marks a dense layer's window, whose width grows from group to group: it is not compiled in.
    """

    batch: int
    height: int
    width: int
    kernel: int
    stride: int
    c_out: int
    group_in: int
    group_out: int
    read: int
    own_width: bool = False

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


class Features(NamedTuple):
    """Stored features and how a reader activates them: relu(scale·v + shift), but for the first `identity`.

    `rows` [P, …] is channels-last; with `block`, [groups, P, block] is group-blocked. scale and shift are float32.
    """

    rows: Tensor
    scale: Tensor
    shift: Tensor
    identity: int = 0
    block: int = 0

    @property
    def step(self) -> int:
        """Elements from one group of channels to the next; 0 where they lie side by side."""
        return self.rows.stride(0) if self.block else 0


class Readers(NamedTuple):
    """Convs that read windows of one buffer, a row each: window start, its width, offset of its weight, of its mask.

    `align` divides every entry.
    """

    rows: Tensor
    align: int

    @classmethod
    def table(cls, rows: Sequence[tuple[int, ...]]) -> Readers:
        return cls(torch.tensor(rows, dtype=torch.int64), alignment(*(entry for row in rows for entry in row)))


class Scratch(NamedTuple):
    """Room for two sums of every tile of pixels and of every FAN tiles, and counters of who has arrived (zero)."""

    first: Tensor
    second: Tensor
    counters: Tensor

    @classmethod
    def allocate(cls, like: Tensor, pixels: int, channels: int) -> Scratch:
        tiles = cdiv(pixels, smallest_tile(architecture(like.device)))
        chunks = cdiv(tiles, FAN)
        sums = like.new_empty((2, tiles + chunks, channels), dtype=torch.float32)
        counters = like.new_zeros((chunks + 1) * max(1, cdiv(channels, 16)), dtype=torch.int32)
        return cls(sums[0], sums[1], counters)


Listener = Callable[..., None]
Recorder = Callable[[Callable[..., Any], dict[str, Any]], None]

_listener: ContextVar[Listener | None] = ContextVar("seqconv_triton_listener", default=None)
recorders: ContextVar[tuple[Recorder, ...]] = ContextVar("seqconv_triton_recorders", default=())


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel, or tell a listener of it (`ahead.py` compiles what it hears of)."""
    listener = _listener.get()
    if listener is None:
        kernel[grid](*arguments, **constants)
    else:
        listener(kernel, arguments, constants)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Inside, this thread launches nothing: `listener(kernel, arguments, constants)` hears of every launch instead."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def record(recorder: Recorder) -> Iterator[None]:
    """Inside, `recorder(launcher, its arguments by name)` hears of this thread's calls of launchers that are tuned."""
    token = recorders.set((*recorders.get(), recorder))
    try:
        yield
    finally:
        recorders.reset(token)


def precision(dtype: torch.dtype) -> str:
    """TF32 only where torch allows it for matrix products and for convolutions.

    `fp32_precision` follows `allow_tf32` too; reading `allow_tf32` raises once somebody has set `fp32_precision`.
    """
    if dtype != torch.float32:
        return "ieee"
    switches = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if switches == ("tf32", "tf32") else "ieee"


def wide(*tensors: Tensor | None) -> bool:
    """Whether a pixel's offset may need 64 bits; steps between groups always have them."""
    return any(t.shape[-2] * t.stride(-2) >= 2**31 for t in tensors if t is not None)


def alignment(*values: int) -> int:
    """The largest of 1, 2, 4, 8, 16 that divides all: 16 bytes of half precision are 8 elements.

    A group's width among them keeps it the same for every second group.
    """
    return math.gcd(16, *values)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def covered(tile: int, group: int, other: int, channels: int, total: int) -> int:
    """Channels on the other side of a grouped conv that a tile of `tile` out of `channels` is connected to."""
    if tile >= channels:
        return total
    return max(1, tile // group) * other


def row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(-2)

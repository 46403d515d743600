"""What all launchers share: the shape of a conv, a BN, scratch memory, and the launch itself, by keyword."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from seqconv_triton.kernels.configs import architecture, smallest_tile

FAN = 32  # tiles whose sums the last of them to arrive adds up; then the last of those adds up the rest
Launcher = TypeVar("Launcher", bound=Callable[..., Any])
Listener = Callable[[Any, tuple[int, ...], dict[str, Any]], None]
Recorder = Callable[[Callable[..., Any], dict[str, Any]], None]
Noter = Callable[[Any, Any, tuple[int, ...], dict[str, Any]], None]

_listener: ContextVar[Listener | None] = ContextVar("seqconv_triton_listener", default=None)
_noter: ContextVar[Noter | None] = ContextVar("seqconv_triton_noter", default=None)
recorders: ContextVar[tuple[Recorder, ...]] = ContextVar("seqconv_triton_recorders", default=())


class ConvShape(NamedTuple):
    """A conv on [batch, ·, height, width]: conv groups of group_in → group_out channels.

    `dense` marks a dense layer's window, whose channels grow from group to group: they are not compiled in.
    """

    batch: int
    height: int
    width: int
    kernel: int
    stride: int
    c_out: int
    group_in: int
    group_out: int
    dense: bool = False

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
    def class_pixels(self) -> int:
        """Pixels of one of the stride² classes into which a transposed conv divides them, rounded up."""
        return self.batch * cdiv(self.height, self.stride) * cdiv(self.width, self.stride)

    @property
    def total_in(self) -> int:
        return self.group_in * (self.c_out // self.group_out)


class BatchNorm(NamedTuple):
    """Some BNs in a row, float32 [C] each; without mean and var, weight and bias are scale and shift."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


class NormGradient(NamedTuple):
    """Where a BN's backward goes, float32: of weight and bias [C], and a, b, c [3, C] of dx = a·g + b·x + c."""

    weight: Tensor | None
    bias: Tensor | None
    coefficients: Tensor | None


class Windows(NamedTuple):
    """Convs over windows of one buffer, `shape` that of the widest.

    Group i reads [i·k, i·k + channels), unless row i of `table`, int64, says otherwise: window start, its channels,
    offset of its weight, of its dropout mask. `most` is the widest window, `align` divides all these numbers.
    """

    shape: ConvShape
    channels: int
    most: int
    table: Tensor | None
    align: int


class Scratch(NamedTuple):
    """Room for two sums of every tile of pixels and of every FAN tiles, and counters of who has arrived (zero)."""

    first: Tensor | None
    second: Tensor | None
    counters: Tensor | None

    @classmethod
    def allocate(cls, like: Tensor, pixels: int, channels: int) -> Scratch:
        tiles = cdiv(pixels, smallest_tile(architecture(like.device)))
        chunks = cdiv(tiles, FAN)
        sums = like.new_empty((2, tiles + chunks, channels), dtype=torch.float32)
        counters = like.new_zeros((chunks + 1) * max(1, cdiv(channels, 16)), dtype=torch.int32)
        return cls(sums[0], sums[1], counters)


def run(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel, or tell a listener of it (`tools/ahead.py` compiles what it hears of)."""
    listener = _listener.get()
    if listener is not None:
        listener(kernel, grid, arguments)
        return
    compiled = _launch(kernel, grid, arguments)
    if (noter := _noter.get()) is not None:
        noter(kernel, compiled, grid, arguments)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> Any:
    return kernel[grid](**arguments)


def listening() -> bool:
    """Whether this thread's launches or launchers' calls are heard of by somebody."""
    return _listener.get() is not None or bool(recorders.get())


@contextmanager
def note(noter: Noter) -> Iterator[None]:
    """Inside, `noter(kernel, compiled kernel, grid, arguments)` hears of every launch that this thread has made."""
    token = _noter.set(noter)
    try:
        yield
    finally:
        _noter.reset(token)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Inside, this thread launches nothing: `listener(kernel, grid, arguments)` hears of every launch instead."""
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


def tunable(launcher: Launcher) -> Launcher:
    """A launcher whose calls `record` hears of."""
    signature = inspect.signature(launcher)

    @wraps(launcher)
    def call(*arguments: Any, **options: Any) -> Any:
        if heard := recorders.get():
            heard[-1](call, dict(signature.bind(*arguments, **options).arguments))
        return launcher(*arguments, **options)

    return call  # type: ignore[return-value]


@triton.jit
def _nothing():
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)  # TRITON_INTERPRET=1: runs on a CPU


def precision(dtype: torch.dtype) -> str:
    """How a product of float32 is computed: as TF32 where PyTorch's convolutions would be (their switch, not matmul's).

    `fp32_precision` follows `allow_tf32` too; reading `allow_tf32` raises once somebody has set `fp32_precision`.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


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

"""Launch configurations: a pure function of what a kernel computes; nothing is measured before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

# Kernel families, and the architectures where a third stage of loads in flight spills registers.
TWO_STAGES = {
    "convolution": ("gfx", "sm_8"),
    "data_gradient": ("gfx", "sm_8"),
    "weight_gradient": ("gfx", "sm_10", "sm_12"),
}


class LaunchConfig(NamedTuple):
    """Tile sizes (pixels, output channels, reduction) and what the compiler is told."""

    block_p: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


_pinned: dict[str, LaunchConfig] = {}


@contextmanager
def pin(kernel: str, block_p: int, block_k: int, num_warps: int = 4, num_stages: int = 2) -> Iterator[None]:
    """Inside, every launch of a kernel family takes these tiles: for tests, and for the same bits on any device.

    Output channels keep the tile that the conv groups ask for. Raises ValueError for an unknown family, and for tiles
    that are no powers of two from 16 on.
    """
    if kernel not in TWO_STAGES:
        raise ValueError(f"unknown kernel {kernel!r} (kernels: {', '.join(TWO_STAGES)})")
    for name, size in (("block_p", block_p), ("block_k", block_k)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} ({size}) must be a power of two from 16 on")
    outer = _pinned.get(kernel)
    _pinned[kernel] = LaunchConfig(block_p, 0, block_k, num_warps, num_stages)
    try:
        yield
    finally:
        if outer is None:
            del _pinned[kernel]
        else:
            _pinned[kernel] = outer


def pinned() -> tuple[tuple[str, LaunchConfig], ...]:
    """What is pinned now, as a key of what was derived from configurations."""
    return tuple(_pinned.items())


def smallest_tile() -> int:
    """The fewest pixels that any tile with statistics has."""
    return min([64, *(config.block_p for config in _pinned.values())])


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def channel_tile(channels: int, group: int, most: int = 128) -> int:
    """Output channels of one tile: whole conv groups, at least the 16 that a matrix instruction takes.

    `channels` are all the conv's, `group` those of one conv group. Small groups are packed block-diagonally; where no
    power of two covers whole groups, one tile takes all channels.
    """
    if group == channels:
        return max(16, min(most, next_power_of_2(channels)))
    packed = group * max(1, -(-16 // group))
    if packed & (packed - 1) == 0 and channels % packed == 0:
        return min(most, packed) if group >= most else packed
    return max(16, next_power_of_2(channels))


_assumed = "sm_90"


@contextmanager
def assume(arch: str) -> Iterator[None]:
    """Inside, what is on no GPU is configured as for this architecture, so that it can be compiled ahead of time."""
    global _assumed
    outer, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = outer


def architecture(device: torch.device) -> str:
    """Of a device: sm_90, gfx942 and the like."""
    return _architecture(device) if device.type == "cuda" else _assumed


@lru_cache(maxsize=16)
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def config_for(
    kernel: str, reduction: int, block_n: int, element_size: int, arch: str = "sm_90", taps: int = 1
) -> LaunchConfig:
    """A good configuration for (kernel, reduction length of one tap, output tile, bytes of an element, GPU, taps).

    Tiles of pixels shrink as tiles of channels grow, so that the float32 accumulator stays at 32 registers a thread.
    """
    if kernel in _pinned:
        return _pinned[kernel]._replace(block_n=block_n)
    return _heuristic(kernel, reduction, block_n, element_size, arch, taps)


@lru_cache(maxsize=1024)
def _heuristic(kernel: str, reduction: int, block_n: int, element_size: int, arch: str, taps: int) -> LaunchConfig:
    stages = 2 if arch.startswith(TWO_STAGES[kernel]) else 3
    block_k = max(16, min(64, next_power_of_2(reduction)))
    if kernel == "weight_gradient":
        return LaunchConfig(32, block_n, block_k, 4, stages)
    if element_size == 4:
        block_k = min(32, block_k)
    # Nine taps of gradients that go through BN on load need registers: a smaller tile, or they spill.
    crowded = kernel == "data_gradient" and taps > 1
    block_p = 128 if block_n <= 64 and not crowded else 64
    blackwell = arch.startswith(("sm_10", "sm_12"))  # its accumulators are not in registers
    if kernel == "data_gradient" and blackwell and taps == 1:
        stages = 2
    if kernel == "convolution" and block_p == 128 and not blackwell:  # longer steps cost half the occupancy
        block_k = min(32, block_k)
    return LaunchConfig(block_p, block_n, block_k, 8 if block_p * block_n >= (4096 if crowded else 8192) else 4, stages)

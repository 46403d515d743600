"""Launch configurations: a pure function of what a kernel computes, and of tables that were measured before.

What is pinned comes first, then the user's own table for the GPU, then the one that ships for it, then the heuristic.
Nothing is measured here: `python -m seqconv_triton tune` does that (docs/tuning.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
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
WITH_SUMS = ("convolution", "data_gradient")  # families whose tiles of pixels leave sums in `launch.Scratch`


class LaunchConfig(NamedTuple):
    """Tile sizes (pixels, output channels, reduction) and what the compiler is told."""

    block_p: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    """What a configuration depends on, beside the GPU; never on the batch or the size of the images.

    `reduction` is the length of one tap's, `block_n` the tile of output channels, `element_size` in bytes.
    """

    kernel: str
    reduction: int
    block_n: int
    element_size: int
    taps: int


Table = Mapping[Key, LaunchConfig]

_pinned: dict[str, LaunchConfig] = {}
_given: tuple[Table, ...] | None = None
_tables: dict[str, tuple[Table, int]] = {}  # of an architecture: the table, and its smallest tile of pixels
_heard: list[Key] | None = None
_versions = itertools.count(1)
_version = 0


def derive_again() -> None:
    """What launchers derived from configurations is derived again before the next launch."""
    global _version
    _version = next(_versions)


@contextmanager
def pin(kernel: str, block_p: int, block_k: int, num_warps: int = 4, num_stages: int = 2) -> Iterator[None]:
    """Inside, every launch of a kernel family takes these tiles: for tests, and for the same bits on any device.

    Output channels keep the tile that the conv groups ask for. Raises ValueError for an unknown family, and for tiles
    that are no powers of two from 16 on.
    """
    if kernel not in TWO_STAGES:
        raise ValueError(f"unknown kernel {kernel!r} (kernels: {', '.join(TWO_STAGES)})")
    for name, size in (("block_p", block_p), ("block_k", block_k)):
        if not is_tile(size):
            raise ValueError(f"{name} ({size}) must be a power of two from 16 on")
    outer = _pinned.get(kernel)
    _pinned[kernel] = LaunchConfig(block_p, 0, block_k, num_warps, num_stages)
    derive_again()
    try:
        yield
    finally:
        if outer is None:
            del _pinned[kernel]
        else:
            _pinned[kernel] = outer
        derive_again()


@contextmanager
def use_tables(*tables: Table) -> Iterator[None]:
    """Inside, these tables are looked up, the first one first, in place of those stored for the GPU.

    Without any, the heuristic alone decides.
    """
    global _given
    outer, _given = _given, tables
    reload_tables()
    try:
        yield
    finally:
        _given = outer
        reload_tables()


def reload_tables() -> None:
    """Read the stored tables again before the next launch; otherwise a process reads them once."""
    _tables.clear()
    derive_again()


def pinned() -> int:
    """A number that changes with what is pinned and with the tables: a key of what was derived from configurations."""
    return _version


@contextmanager
def hear_keys() -> Iterator[list[Key]]:
    """The keys that configurations are asked for inside; nothing derived from them earlier is used."""
    global _heard
    outer, _heard = _heard, []
    derive_again()
    try:
        yield _heard
    finally:
        _heard = outer


def smallest_tile(arch: str) -> int:
    """The fewest pixels that any tile with sums has, whichever configuration is in use."""
    return min([_stored(arch)[1], *(config.block_p for kernel, config in _pinned.items() if kernel in WITH_SUMS)])


def is_tile(size: int) -> bool:
    """Whether a matrix instruction can take a tile of this size: a power of two from 16 on."""
    return size >= 16 and size & (size - 1) == 0


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
    """Of a device: sm_90, gfx942 and the like; of a GPU with its name behind a colon, by which tables are stored."""
    return _architecture(device) if device.type == "cuda" else _assumed


@lru_cache(maxsize=16)
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return f"{properties.gcnArchName.split(':')[0]}:{properties.name}"
    return f"sm_{properties.major}{properties.minor}:{properties.name}"


def _stored(arch: str) -> tuple[Table, int]:
    """The table of an architecture, read when it is first asked for, and the smallest of its tiles with sums."""
    found = _tables.get(arch)
    if found is None:
        gpu = arch.partition(":")[2]
        merged: dict[Key, LaunchConfig] = {}
        if _given is not None:
            for table in reversed(_given):
                merged.update(table)
        elif gpu:
            from seqconv_triton.kernels.tuning_tables import configurations

            merged.update(configurations(gpu, arch))
        tiles = [config.block_p for key, config in merged.items() if key.kernel in WITH_SUMS]
        found = _tables[arch] = (merged, min([64, *tiles]))  # the heuristic's have 64 at least
    return found


def config_for(
    kernel: str, reduction: int, block_n: int, element_size: int, arch: str = "sm_90", taps: int = 1
) -> LaunchConfig:
    """The configuration for (kernel, reduction length of one tap, output tile, bytes of an element, GPU, taps)."""
    key = Key(kernel, reduction, block_n, element_size, taps)
    if _heard is not None:
        _heard.append(key)
    chosen = _pinned.get(kernel) or _stored(arch)[0].get(key) or heuristic(key, arch)
    return chosen._replace(block_n=block_n)


@lru_cache(maxsize=1024)
def heuristic(key: Key, arch: str) -> LaunchConfig:
    """A good configuration that was not measured.

    Tiles of pixels shrink as tiles of channels grow, so that the float32 accumulator stays at 32 registers a thread.
    """
    kernel, reduction, block_n, element_size, taps = key
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

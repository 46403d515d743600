"""Tiles, warps and stages by rule, for every kernel and GPU, without a measurement; and which tiles there can be."""

from __future__ import annotations

import math
import re
from functools import cache, lru_cache
from typing import NamedTuple

# Kernel families, those that multiply matrices, and the architectures where a third stage of loads in flight spills.
TWO_STAGES = {
    "convolution": ("gfx", "sm_8", "sm_12"),
    "transposed": ("gfx", "sm_8", "sm_12"),
    "pull": ("gfx", "sm_8", "sm_12"),
    "weight_gradient": ("gfx", "sm_10", "sm_12"),
}


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


class Spilling(NamedTuple):
    """Kernels that spill as the general rule has them, and what they take instead; None stands for any."""

    kernel: str
    gpus: tuple[str, ...]  # beginnings of their names
    block_n: int | None
    one_tap: bool | None
    float32: bool | None
    instead: dict[str, int]
    reduction: tuple[float, float] = (0, math.inf)  # first and last

    def is_about(self, key: Key, arch: str) -> bool:
        return (
            key.kernel == self.kernel
            and arch.startswith(self.gpus)
            and self.block_n in (None, key.block_n)
            and self.one_tap in (None, key.taps == 1)
            and self.float32 in (None, key.element_size > 2)
            and self.reduction[0] <= key.reduction <= self.reduction[1]
        )


SM_8, SM_80, SM_86 = ("sm_8",), ("sm_80", "sm_87"), ("sm_86", "sm_89")
SM_9, SM_10, SM_12 = ("sm_9",), ("sm_10",), ("sm_12",)
# As `python -m bench compiled` finds them: most on sm_8, whose assembler keeps registers back for more programs a time.
# Kernel, GPUs, tile of output channels, whether it has one tap, whether it is float32.
SPILLING = (
    Spilling("convolution", SM_80, 16, False, None, {"num_stages": 3}, reduction=(16, 16)),
    Spilling("convolution", SM_86, 16, True, None, {"num_stages": 3}),
    Spilling("convolution", SM_8, 64, False, None, {"num_stages": 3}),
    Spilling("convolution", SM_10, 16, True, False, {"block_k": 32}, reduction=(33, math.inf)),
    Spilling("convolution", SM_10, 16, False, True, {"num_stages": 2}),
    Spilling("convolution", SM_10, 128, None, True, {"num_warps": 4}),
    Spilling("convolution", SM_12, 16, False, True, {"num_stages": 3}),
    Spilling("convolution", SM_12, 64, True, False, {"num_stages": 3}),
    Spilling("transposed", SM_80, 128, False, False, {"num_warps": 4}),
    Spilling("transposed", SM_86, 32, False, True, {"num_stages": 3}),
    Spilling("transposed", SM_10, 128, None, True, {"num_warps": 4}),
    Spilling("pull", SM_8, 128, None, False, {"num_warps": 4}),
    Spilling("pull", SM_86, None, None, None, {"num_warps": 4}, reduction=(16, 16)),
    Spilling("pull", SM_86, 16, False, True, {"num_stages": 3}),
    Spilling("pull", SM_12, 64, None, None, {"num_warps": 8}),
    Spilling("weight_gradient", SM_80, 128, True, None, {"num_stages": 2}, reduction=(1025, math.inf)),
    Spilling("weight_gradient", SM_86, 128, True, None, {"num_stages": 2}),
    Spilling("weight_gradient", SM_8, 128, False, None, {"num_warps": 8}, reduction=(1, 16)),
    Spilling("weight_gradient", SM_9, 128, False, False, {"num_warps": 8}, reduction=(33, math.inf)),
)


@lru_cache(maxsize=1024)
def heuristic(key: Key, arch: str) -> LaunchConfig:
    """A good configuration that was not measured.

    Tiles of pixels shrink as tiles of channels grow, so that the float32 accumulator stays at 64 registers a thread.
    """
    kernel, reduction, block_n, element_size, _ = key
    float32, hopper = element_size > 2, arch.startswith(SM_9)
    stages = 2 if arch.startswith(TWO_STAGES[kernel]) else 3
    block_k = max(16, min(32 if float32 or arch.startswith(SM_8 + SM_12) else 64, next_power_of_2(reduction)))
    if kernel == "weight_gradient":
        block_p, warps = 32 if float32 else 64, 4
    else:
        block_p = 128 if block_n <= 32 or (block_n <= 64 and hopper and kernel == "convolution") else 64
        # Hopper multiplies by whole warpgroups, whose operands stay in shared memory: elsewhere they need registers.
        warps = 8 if block_n * element_size > 128 and not hopper else 4
    config = LaunchConfig(block_p, block_n, block_k, warps, stages)
    for spilling in SPILLING:
        if spilling.is_about(key, arch):
            config = config._replace(**spilling.instead)
    return as_fenced(config, arch)


def as_fenced(config: LaunchConfig, arch: str) -> LaunchConfig:
    """A configuration whose matrix products read what the compiler has made visible to them.

    Hopper's and data-centre Blackwell's read shared memory through a proxy of their own. Copies in flight, of two
    stages or more, are fenced for it by Triton 3.7.1 and later (https://github.com/triton-lang/triton/pull/9610), what
    a single stage stores by every version.
    """
    return config if loads_ahead(arch) else config._replace(num_stages=1)


def loads_ahead(arch: str) -> bool:
    """Whether a kernel may copy what a later product reads."""
    return fences_copies() or not arch.startswith(SM_9 + SM_10)


@cache
def fences_copies() -> bool:
    """Whether the installed Triton does; where there is none, nothing will be compiled."""
    try:
        import triton
    except ImportError:
        return True
    return tuple(map(int, re.findall(r"\d+", triton.__version__)[:3])) >= (3, 7, 1)


def is_tile(size: int) -> bool:
    """Whether a matrix instruction can take a tile of this size: a power of two from 16 on."""
    return size >= 16 and size & (size - 1) == 0


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def channel_tile(channels: int, group: int, most: int = 128) -> int:
    """Output channels of one tile, at least the 16 that a matrix instruction takes.

    `channels` are all the conv's, `group` those of one conv group (as `packing_factor` packs them): a tile is a part of
    one, or has them all.
    """
    if group == channels or group % 16:
        return max(16, min(most if group == channels else channels, next_power_of_2(channels)))
    return min(most, group)


@lru_cache(maxsize=1024)
def packing_factor(groups: int, group_in: int, group_out: int) -> int:
    """How many neighbouring conv groups are laid out as one block-diagonal group: up to 64 channels, or all.

    Sides of a packed group are powers of two from 16 on, so that tiles hold whole groups, unless it is the only one.
    """

    def fits(factor: int) -> bool:
        return all(is_tile(factor * side) for side in (group_in, group_out))

    factors = [f for f in range(1, groups + 1) if groups % f == 0 and (fits(f) or f == groups)]
    full = [f for f in factors if f * max(group_in, group_out) <= 64]
    return max(full) if full else min(factors)

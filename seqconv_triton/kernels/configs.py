"""Launch configurations: a pure function of what a kernel computes; nothing is measured before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes (pixels, output channels, reduction) and what the compiler is told."""

    block_p: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def channel_tile(channels: int, group: int, most: int = 128) -> int:
    """Output channels of one tile: whole conv groups, at least the 16 that a matrix instruction takes.

    `channels` are all the conv's, `group` those of one conv group. Small groups are packed block-diagonally; where no
    power of two covers whole groups, one tile takes all channels.
    """
    if group == channels:
        return max(16, min(most, triton.next_power_of_2(channels)))
    packed = group * max(1, -(-16 // group))
    if packed & (packed - 1) == 0 and channels % packed == 0:
        return min(most, packed) if group >= most else packed
    return max(16, triton.next_power_of_2(channels))


def config_for(kernel: str, reduction: int, block_n: int, element_size: int) -> LaunchConfig:
    """A good configuration for (kernel, reduction length of one tap, output tile, bytes of an element).

    Tiles of pixels shrink as tiles of channels grow, so that the float32 accumulator stays at 32 registers a thread.
    """
    block_k = max(16, min(64, triton.next_power_of_2(reduction)))
    if element_size == 4:
        block_k = min(32, block_k)
    if kernel == "weight_gradient":
        return LaunchConfig(32, block_n, max(16, min(64, triton.next_power_of_2(reduction))), 4, 3)
    block_p = 128 if block_n <= 64 else 64
    return LaunchConfig(block_p, block_n, block_k, 8 if block_p * block_n >= 8192 else 4, 3)

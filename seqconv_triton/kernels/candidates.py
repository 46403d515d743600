"""The configurations worth measuring for a key: a pure function, the heuristic's first, at most eight."""

from __future__ import annotations

from seqconv_triton.kernels.heuristic import Key, LaunchConfig, as_fenced, heuristic, is_tile, next_power_of_2

MOST = 8
REGISTERS = 64  # of a thread, for the float32 accumulator: twice the heuristic's
# Shared memory that one program may have, KiB, by the beginning of the architecture's name; the others have 99.
SHARED_KIB = {"gfx": 64, "sm_80": 163, "sm_87": 163, "sm_9": 227, "sm_10": 227}


def candidates(key: Key, arch: str) -> list[LaunchConfig]:
    """From the heuristic's configuration by changing one thing, then two; those that cannot fit are left out."""
    h = heuristic(key, arch)
    p, k, warps, stages = h.block_p, h.block_k, h.num_warps, h.num_stages
    if key.kernel == "weight_gradient":  # its block_p is the length of one product, block_k the tile of inputs
        steps = [(2 * p, k), (p, 2 * k), (2 * p, 2 * k), (p, k // 2), (4 * p, k), (2 * p, k // 2)]
    else:
        steps = [(p, 2 * k), (p, k // 2), (p // 2, k), (2 * p, k), (p // 2, 2 * k), (p // 4, k)]
    other = stages + 1 if stages == 2 else stages - 1
    proposed = [h._replace(num_stages=other), h._replace(num_warps=4 if warps > 4 else 8)]
    for block_p, block_k in steps:
        # As many accumulators a thread as the heuristic's, between four warps and eight.
        growth = block_k / k if key.kernel == "weight_gradient" else block_p / p
        proposed.append(h._replace(block_p=block_p, block_k=block_k, num_warps=max(4, min(8, int(warps * growth)))))
    proposed.append(h._replace(num_stages=stages + 1 if other < stages else stages + 2))
    different = dict.fromkeys(as_fenced(c, arch) for c in proposed)
    return [h, *(c for c in different if c != h and fits(c, key, arch))][:MOST]


def fits(config: LaunchConfig, key: Key, arch: str) -> bool:
    """Whether tiles are tiles, no longer than the reduction, and can live in registers and shared memory."""
    p, n, k = config.block_p, key.block_n, config.block_k
    if not (is_tile(p) and is_tile(k)) or k > max(16, next_power_of_2(key.reduction)):
        return False
    sums, loaded = (n * k, p * (n + k)) if key.kernel == "weight_gradient" else (p * n, k * (p + n))
    lanes = (64 if arch.startswith("gfx") else 32) * config.num_warps
    return sums <= REGISTERS * lanes and config.num_stages * loaded * key.element_size <= shared_memory(arch)


def shared_memory(arch: str) -> int:
    """Bytes that one program may have."""
    return 1024 * next((kib for start, kib in SHARED_KIB.items() if arch.startswith(start)), 99)

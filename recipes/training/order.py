"""Which images every process sees when, and its random numbers: pure functions of the seed and the position.

No generator's state survives a step, so a run that goes on from (epoch, step) sees what it would have seen, whatever
the number of loading processes. Several training processes share each global batch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch


class Share(NamedTuple):
    """One process's part of a global batch: index lists, one a backward pass; `images` in the whole batch."""

    pieces: list[list[int]]
    images: int


def seed_for(*position: int | str) -> int:
    """A seed of 63 bits for a position such as (seed, "order", epoch): near positions give unrelated ones."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(*position: int | str) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, on all devices."""
    seed = seed_for(*position)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the generator that others' code uses)
    torch.manual_seed(seed)


def epoch_order(images: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch sees the images."""
    generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
    order: list[int] = torch.randperm(images, generator=generator).tolist()
    return order


def steps_per_epoch(images: int, batch_size: int, pieces: int) -> int:
    """Global batches an epoch; a last one of fewer images than `pieces` (processes × accumulation) is left out."""
    full, rest = divmod(images, batch_size)
    return full + (rest >= pieces)


def shares(
    order: list[int], batch_size: int, *, world: int = 1, rank: int = 0, accumulate: int = 1, start: int = 0
) -> Iterator[Share]:
    """This rank's share of every global batch from step `start` on: `accumulate` pieces, even to one image.

    The pieces of all ranks, in rank order, are the batch of one process.
    """
    pieces = world * accumulate
    for step in range(start, steps_per_epoch(len(order), batch_size, pieces)):
        batch = order[step * batch_size : (step + 1) * batch_size]
        bounds = [len(batch) * i // pieces for i in range(pieces + 1)]
        mine = range(rank * accumulate, (rank + 1) * accumulate)
        yield Share([batch[bounds[i] : bounds[i + 1]] for i in mine], len(batch))


def evaluation_pieces(images: int, batch_size: int, *, world: int = 1, rank: int = 0) -> list[list[int]]:
    """Every image once over all ranks, in batches."""
    mine = list(range(rank, images, world))
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

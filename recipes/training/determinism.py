"""Runs that give the same bits every time: PyTorch's switches, put back as they were afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(enable: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms where `enable`; an operation that has none raises RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or enable)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """The same numbers every time for tiny images: torch seeded, deterministic algorithms, one thread.

    Images of 8×8 pixels leave a second thread little but waiting, and on a busy machine that costs most of the time.
    """
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            torch.set_num_threads(threads)

"""Interleaved timing: every contender runs once a round, so that a machine's drift hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Timing:
    """Seconds of every round of one contender."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        lower, _, upper = statistics.quantiles(self.seconds, n=4)
        return lower, upper


def interleave(contenders: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, Timing]:
    """Median-ready timings of all contenders; the first `warm_up` rounds do not count."""
    timings = {name: Timing([]) for name in contenders}
    for i in range(warm_up + rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if i >= warm_up:
                timings[name].seconds.append(time.perf_counter() - start)
    return timings


def pairwise_ratio(slow: Timing, fast: Timing) -> float:
    """Median over the rounds of how many times as fast `fast` was in the same round."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))

"""Clocks for a CPU and a GPU, and interleaved rounds: a machine's drift hits every contender alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# Marks the end of a part of a run: forward, backward, step.
Mark = Callable[[str], None]
Run = Callable[[Mark], object]


def unmarked(_: str) -> None:
    """For runs that nobody times."""


@dataclass
class Timing:
    """Seconds of every round of one part of one contender."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper


class WallClock:
    """Seconds since the start at every mark, for work that is done when the call returns."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}
        self.start = time.perf_counter()

    def mark(self, name: str) -> None:
        self.marks[name] = time.perf_counter() - self.start

    def read(self) -> dict[str, float]:
        return self.marks


class EventClock:
    """The same from CUDA events, behind a write of more than the L2 cache holds: operands come from memory."""

    flushed: dict[torch.device, torch.Tensor] = {}  # noqa: RUF012 - one buffer a device, made on first use

    def __init__(self, device: torch.device) -> None:
        if device not in self.flushed:
            size = 2 * max(64 * 2**20, torch.cuda.get_device_properties(device).L2_cache_size)
            self.flushed[device] = torch.empty(size, dtype=torch.uint8, device=device)
        self.flushed[device].zero_()
        self.events: dict[str, Any] = {}
        self.start = self.record()

    @staticmethod
    def record() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, name: str) -> None:
        self.events[name] = self.record()

    def read(self) -> dict[str, float]:
        torch.cuda.synchronize()
        return {name: self.start.elapsed_time(event) / 1e3 for name, event in self.events.items()}


def parts(marks: Mapping[str, float]) -> dict[str, float]:
    """Seconds of forward, backward and the whole step from the times of their marks; one mark is its own part."""
    result = dict(marks)
    if "backward" in result:
        result["backward"] -= result["forward"]
    return result


def timed(run: Run, device: torch.device) -> dict[str, float]:
    """Seconds of the parts of one run."""
    clock = EventClock(device) if device.type == "cuda" else WallClock()
    run(clock.mark)
    return parts(clock.read())


def interleave(
    contenders: Mapping[str, Callable[[], Mapping[str, float]]],
    rounds: int,
    warm_up: int = 1,
    failed: Callable[[str, Exception], object] | None = None,
) -> dict[str, dict[str, Timing]]:
    """Timings of every contender by part, one run of each a round; the first `warm_up` rounds do not count.

    A contender runs once and returns the seconds of its parts. The order turns by one every round, so that nobody
    always follows the same neighbour's cache. Who raises goes to `failed` and is left out, times and all; without
    `failed` the error is raised.
    """
    timings: dict[str, dict[str, Timing]] = {name: {} for name in contenders}
    names = list(contenders)
    for i in range(warm_up + rounds):
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if name not in timings:
                continue
            try:
                found = contenders[name]()
            except Exception as error:  # the others' rounds must not be lost
                if failed is None:
                    raise
                failed(name, error)
                del timings[name]
                continue
            if i >= warm_up:
                for part, seconds in found.items():
                    timings[name].setdefault(part, Timing()).seconds.append(seconds)
    return timings


@contextmanager
def cold_compilation() -> Iterator[None]:
    """No compilation cache on disk helps inside."""
    import warnings

    import torch._inductor.config

    with torch._inductor.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that caches are off
        yield

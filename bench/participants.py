"""Who takes part in a case: runs once for the check, then once a round, then for its memory; here in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from bench import check, memory
from bench.cases import Case
from bench.contenders import Contender, Found, compiled
from bench.results import Row
from bench.timing import cold_compilation, timed


class Participant(Protocol):
    """A contender, in this process (`Local`) or in one of its own (`workers.Worker`)."""

    def first(self) -> tuple[Row, Found]:
        """Run once, for the check: what belongs into the row, and what the run computed."""

    def run(self) -> dict[str, float]:
        """Run once, for the clock: seconds by part."""

    def memory(self) -> Row:
        """Run for the bytes: behind all that is timed, since what counts them leaves its traces in the heap."""

    def close(self) -> None:
        """End what it has started; any number of times."""


@dataclass(frozen=True)
class Setting:
    """Where a case's participants come from, by label and turn, and what each family of them is compared with."""

    start: Callable[[str, int], Participant]
    expected: Callable[[str], check.Expected]
    processes: int = 1


class Lost(RuntimeError):
    """What went wrong in another process, in the words for its row."""


def reason(error: Exception) -> str:
    """An error in one line, as a row has it."""
    if isinstance(error, Lost):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@dataclass
class Local:
    """A contender of this process."""

    contender: Contender
    case: Case
    device: torch.device
    cold: bool = True

    def first(self) -> tuple[Row, Found]:
        compiles, cold = compiled(self.contender.label), self.cold and self.device.type == "cpu"
        start = time.perf_counter()
        with cold_compilation() if compiles and cold else nullcontext():
            found = check.pieces_of(self.contender, self.case)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        facts: Row = {}
        if compiles:
            facts = {"compile_seconds": time.perf_counter() - start, "caches": "cold" if cold else "warm"}
        self.contender.results.clear()
        return facts, found

    def run(self) -> dict[str, float]:
        return timed(self.contender.run, self.device)

    def memory(self) -> Row:
        how = self.contender.label.split()[-1]
        # A graph's memory is a pool that no run changes; a kernel alone has operands only.
        found: Row = {} if how in ("graph", "plain") else {"peak_bytes": memory.peak(self.contender, self.device)}
        if self.case.training and not compiled(self.contender.label):
            found["kept_bytes"] = memory.kept(self.contender)
        return found

    def close(self) -> None:
        """Nothing was started."""

"""The machine from Python: launches, and what it reports of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emulator.build import library, names
from emulator.ptx import Kernel

MOST_REPORTS = 256
ENDLESS = 10**9  # warp instructions of one launch
BURST = 6  # a warp runs a few instructions, 8 times as many or 100 times as many, before another one does

i64, u64, pointer = ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


def _fields(kind: Any, text: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in text.split()]


class _Options(ctypes.Structure):
    _fields_ = _fields(i64, "seed resident burst track limit shared late")


class _Launch(ctypes.Structure):
    _fields_ = [
        *_fields(pointer, "code lists presets parameters starts sizes"),
        *_fields(i64, "length slots threads preset_count range_count shared_granule global_granule"),
        ("grid", i64 * 3), ("options", _Options),
    ]  # fmt: skip


class _Counts(ctypes.Structure):
    _fields_ = [("instructions", i64 * 7), *_fields(i64, "loaded stored programs")]


class _Report(ctypes.Structure):
    _fields_ = [*_fields(i64, "finding pc other_pc program warp lane count"), ("address", u64)]


@dataclass(frozen=True)
class Schedule:
    """The order of what happens. Seed 0 runs one program after the other; any other seed keeps 2 to 8 of them resident.

    What is asynchronous happens when it is issued (`late` 0), when it is waited for (1), or either, at random (2).
    """

    seed: int = 0
    late: int | None = None

    def options(self, shared: int, track: bool) -> _Options:
        resident = 1 if self.seed == 0 else 2 + self.seed % 7
        late = self.late if self.late is not None else 1 if self.seed == 0 else 2
        return _Options(self.seed * 0x9E3779B9 + 1, resident, BURST, track, ENDLESS, shared, late)


@dataclass(frozen=True)
class Report:
    """`times` it happened at this instruction (and against that other one); the rest is the first time."""

    finding: str
    kernel: str
    instruction: str
    place: str
    other: str
    other_place: str
    program: int
    warp: int
    lane: int
    address: int
    times: int

    @property
    def is_error(self) -> bool:
        return self.finding not in names("notes")

    def __str__(self) -> str:
        against = f"\n      against {self.other_place}: {self.other}" if self.other else ""
        return (
            f"{self.finding} ×{self.times} in {self.kernel} (program {self.program}, warp {self.warp}, "
            f"lane {self.lane}, at {self.address:#x})\n      {self.place}: {self.instruction}{against}"
        )


@dataclass(frozen=True)
class Result:
    """Of a launch: warp instructions by kind, bytes loaded and stored in global memory, programs, reports."""

    instructions: dict[str, int]
    loaded: int
    stored: int
    programs: int
    reports: list[Report]

    @property
    def errors(self) -> list[Report]:
        return [report for report in self.reports if report.is_error]


def launch(
    kernel: Kernel, grid: Sequence[int], parameters: Sequence[int], memory: Sequence[tuple[int, int]], shared: int,
    schedule: Schedule = Schedule(), *, track: bool = True,
) -> Result:  # fmt: skip
    """Run a grid. `parameters` are the bits of every kernel parameter, `memory` the (start, bytes) it may touch.

    Without `track` global memory has no shadow: faster, and blind to races between programs.
    """
    if len(parameters) != len(kernel.parameters):
        raise ValueError(f"{kernel.name} has {len(kernel.parameters)} parameters, not {len(parameters)}")
    arrays = [
        np.ascontiguousarray(kernel.code), kernel.lists, np.ascontiguousarray(kernel.presets),
        *(np.array([int(v) & 2**64 - 1 for v in values], dtype=np.uint64)
          for values in (parameters, [start for start, _ in memory], [size for _, size in memory])),
    ]  # fmt: skip
    given = _Launch(
        *(array.ctypes.data for array in arrays), len(kernel.code), kernel.slots, kernel.threads, len(kernel.presets),
        len(memory), kernel.shared_granule, kernel.global_granule, (i64 * 3)(*[*grid, 1, 1][:3]),
        schedule.options(shared, track),
    )  # fmt: skip
    counts, reports = _Counts(), (_Report * MOST_REPORTS)()
    found = library().launch(ctypes.byref(given), ctypes.byref(counts), reports, i64(MOST_REPORTS))
    return Result(
        dict(zip(names("kinds"), counts.instructions, strict=True)), counts.loaded, counts.stored, counts.programs,
        [_worded(report, kernel) for report in reports[: min(found, MOST_REPORTS)]],
    )  # fmt: skip


def unexecuted(kernel: Kernel, finding: str, pc: int, other: int) -> Report:
    """Of an instruction, and another one, that stand in the text, whether they were met or not."""
    text, places = kernel.text, kernel.places
    return Report(finding, kernel.name, text[pc], places[pc], text[other], places[other], 0, 0, 0, 0, 1)


def _worded(report: _Report, kernel: Kernel) -> Report:
    against = report.other_pc >= 0
    return Report(
        names("findings")[report.finding], kernel.name, kernel.text[report.pc], kernel.places[report.pc],
        kernel.text[report.other_pc] if against else "", kernel.places[report.other_pc] if against else "",
        report.program, report.warp, report.lane, report.address, report.count,
    )  # fmt: skip

"""Which of the three counts was wrong: each kernel's measured time against its bytes, FLOPs and issue slots.

A bound is what takes longest; it decides a kernel's floor. Where kernels that one bound decides take much longer than
their floor, that count leaves something out; where they take less, it counts too much.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.report import milliseconds
from bench.results import timed

Contents = dict[str, Any]
BOUNDS = ("bytes", "FLOPs", "issue")
RIGHT = 1.25  # times its floor, in the median, that a kernel may take before its bound is called wrong
BEATEN = 0.95  # of its floor: less than that is no noise


class Compared(NamedTuple):
    """A kernel's case: seconds as measured, and those of the three counts in the order of BOUNDS."""

    name: str
    measured: float
    seconds: tuple[float, float, float]
    launch: float  # what the clock shows for a launch that does nothing

    @property
    def bound(self) -> str:
        return BOUNDS[self.seconds.index(max(self.seconds))]

    @property
    def times(self) -> float:
        """Measured over floor, without the launch."""
        return max(0.0, self.measured - self.launch) / max(self.seconds)


def compared(contents: Contents) -> list[Compared]:
    """All kernels alone that were timed and whose instructions were counted."""
    ceilings = contents.get("ceilings", {})
    return [
        Compared(
            row["subject"].removeprefix("kernel "),
            row["median"],
            (
                row["moved_bytes"] / ceilings["bytes_per_second"],
                row["operations"] / ceilings["operations_per_second"],
                row["issue_seconds"],
            ),
            ceilings.get("launch_seconds", 0.0),
        )
        for row in timed(contents["rows"]).values()
        if row["subject"].startswith("kernel ") and "issue_seconds" in row
    ]


def verdicts(kernels: Sequence[Compared]) -> list[str]:
    """A sentence for every bound."""
    lines = []
    for bound in BOUNDS:
        own = sorted((kernel for kernel in kernels if kernel.bound == bound), key=lambda kernel: kernel.times)
        if not own:
            lines.append(f"{bound}: decide no kernel here")
            continue
        middle = statistics.median(kernel.times for kernel in own)
        text = (
            f"{bound}: decide {len(own)} of {len(kernels)} kernels, which take {own[0].times:.2f} to "
            f"{own[-1].times:.2f} times as long (median {middle:.2f})"
        )
        if own[0].times < BEATEN:
            text += f": WRONG, it counts more than {own[0].name} needs"
        elif middle > RIGHT:
            text += f": WRONG, it leaves something out, most in {own[-1].name}"
        else:
            text += ": right"
        lines.append(text)
    return lines


HEAD = ("kernel alone", "measured ms", "bytes ms", "FLOPs ms", "issue ms", "measured ÷ floor", "bound")


def cells(kernel: Compared) -> tuple[str, ...]:
    numbers = (milliseconds(kernel.measured), *map(milliseconds, kernel.seconds), f"{kernel.times:.2f}")
    return (kernel.name, *numbers, kernel.bound)


def text(contents: Contents) -> str:
    """For a terminal; empty where no kernel was counted."""
    kernels = compared(contents)
    if not kernels:
        return ""
    lines = [
        f"{name:<48}" + "".join(f"{cell:>{len(head) + 2}}" for cell, head in zip(rest, HEAD[1:], strict=True))
        for name, *rest in (HEAD, *map(cells, kernels))
    ]
    return "\n".join([*lines, *verdicts(kernels)])


def markdown(contents: Contents) -> str:
    kernels = compared(contents)
    if not kernels:
        return ""
    lines = [HEAD, ("---",) * len(HEAD), *map(cells, kernels)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n" + "\n".join(f"- {line}" for line in verdicts(kernels)) + "\n"

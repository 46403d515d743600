"""What bfloat16 gains on a CPU, and what it costs: everyone's float32 and bfloat16 times of one run, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.goals import PARTS, finder, in_bfloat16
from bench.report import milliseconds
from bench.tables import dated

Contents = dict[str, Any]
Case = tuple[str, str, int]  # subject, part, batch


def contenders(runs: Sequence[Contents]) -> Iterator[tuple[Case, str, list[tuple[float, float] | None]]]:
    """Case, name, and each run's (float32, bfloat16) medians, of everyone who has both in some run."""
    finders = [finder(run) for run in runs]
    for case in dict.fromkeys(case for run in runs for case in in_bfloat16(run)):
        rows = [row for run in runs for row in run["rows"] if (row["subject"], row["part"], row["batch"]) == case]
        for label in dict.fromkeys(row["contender"] for row in rows):
            found = [[find(*case, label, dtype) for dtype in ("float32", "bfloat16")] for find in finders]
            medians = [
                None if whole is None or half is None else (whole["median"], half["median"]) for whole, half in found
            ]
            who = label.split()[0]
            name = {"ours": f"**{case[0]}, ours**", "reference": f"{case[0]}, concatenating"}.get(who, who)
            if any(medians):
                yield case, name, medians


def markdown(contents: Contents) -> str:
    """A line for every case and contender."""
    lines = ["| | batch | | float32 | bfloat16 | bfloat16 is |", "| --- | --- | --- | --- | --- | --- |"]
    for (_, part, batch), name, ((whole, half),) in contenders([contents]):  # type: ignore[misc] # one run, which has both
        lines.append(
            f"| {PARTS[part]} | {batch} | {name} | {milliseconds(whole)} ms | {milliseconds(half)} ms | "
            f"{whole / half:.2f} × as fast |"
        )
    return "\n".join(lines) + "\n"


def side_by_side(runs: Sequence[Contents]) -> str:
    """The same, a column for every run."""
    lines = [f"| float32 → bfloat16 | batch | {' | '.join(map(dated, runs))} |", "| --- " * (len(runs) + 2) + "|"]
    for (_, part, batch), name, medians in contenders(runs):
        cells = ["" if pair is None else halved(*pair) for pair in medians]
        lines.append(f"| {name}, {PARTS[part]} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def halved(whole: float, half: float) -> str:
    return f"{milliseconds(whole)} → {milliseconds(half)} ms, {whole / half:.2f} ×"

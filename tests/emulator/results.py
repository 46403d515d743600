"""Rows of all tasks, summed up into docs/results/emulation.json and a page with its tables."""

from __future__ import annotations

import datetime
import json
import platform
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from emulator.build import names
from emulator.work import Row, Task

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
FINDINGS = ("races", "misaligned", "out of bounds", "other errors")
PROVENANCE = ("torch", "triton")
ALONE = "fp32, fp16"  # what the tests of single kernels take


def category(finding: str) -> str:
    """The column of an error."""
    for word, column in {
        "race": "races",
        "two values": "races",
        "misaligned": "misaligned",
        "out of": "out of bounds",
    }.items():
        if word in finding:
            return column
    return "other errors"


class Results:
    """Sums by part, architecture and dtype."""

    def __init__(self) -> None:
        self.rows: list[tuple[Task, Row]] = []

    def add(self, task: Task, row: Row) -> None:
        self.rows.append((task, row))

    @property
    def complaints(self) -> list[str]:
        return [f"{task.name}: {complaint}" for task, row in self.rows for complaint in row.complaints]

    def groups(self) -> list[dict[str, Any]]:
        """One entry for every part, architecture and dtype."""
        found: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for task, row in sorted(self.rows, key=lambda pair: pair[0].name):
            found[task.part, task.architecture, task.dtype].append(row)
        return [
            {"part": part, "architecture": architecture, "dtype": dtype, "tasks": len(rows), **summed(rows)}
            for (part, architecture, dtype), rows in found.items()
        ]

    def mutations(self) -> list[dict[str, Any]]:
        """By architecture, kernel and fault: places, and how many times each line stayed silent."""
        places: Counter[tuple[str, str, str]] = Counter()
        silent: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
        for task, row in self.rows:
            for share in row.mutations:
                key = task.architecture, share["kernel"], share["fault"]
                places[key] += share["places"]
                silent[key].update(share["silent"])
        return [
            {"architecture": a, "kernel": k, "fault": f, "places": n, "silent": dict(silent[a, k, f])}
            for (a, k, f), n in sorted(places.items())
        ]

    def cases(self) -> list[dict[str, Any]]:
        return [
            {"architecture": task.architecture, "dtype": task.dtype, "case": task.case, **summed([row])}
            for task, row in sorted(self.rows, key=lambda pair: pair[0].name)
            if task.part == "cases"
        ]

    def page(self) -> str:
        head = ["part", "GPU", "dtype", "tasks", "launches", "warp instructions", *FINDINGS, "output", "gradient"]
        lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
        for g in self.groups():
            if g.get("launches"):
                dtype = ALONE if g["part"] == "alone" else g["dtype"]
                cells = [g["part"], g["architecture"], dtype, g["tasks"], g["launches"], f"{g['instructions']:,}"]
                cells += [g[name] for name in FINDINGS] + [
                    f"{g[n]:.1e}" if n in g else "–" for n in ("output", "gradient")
                ]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        for g in self.groups():
            if read := g.get("kernels_read"):
                lines += ["", f"PTX of {read:,} kernels read, {g['architecture']}, {g['dtype']}:"]
                lines.append(f"{g['complaints']} with poison, or wrong by Triton's issue 9433.")
        lines += ["", "| GPU | kernel | fault | noticed | silent at |", "| --- | --- | --- | --- | --- |"]
        for m in self.mutations():
            where = ", ".join(f"{line} ×{n}" if n > 1 else line for line, n in m["silent"].items()) or "–"
            noticed = f"{m['places'] - sum(m['silent'].values())} of {m['places']}"
            lines.append(f"| {m['architecture']} | `{m['kernel']}` | {m['fault']} | {noticed} | {where} |")
        return "\n".join(lines)

    def write(self, tasks: int) -> None:
        """Of `tasks` in all those that are finished."""
        machine = {name: version(name) for name in PROVENANCE} | {"python": platform.python_version()}
        today = datetime.date.today().isoformat()
        seconds = round(sum(row.seconds for _, row in self.rows))
        data = {
            "date": today, "versions": machine, "seconds": seconds, "finished": len(self.rows), "tasks": tasks,
            "groups": self.groups(),
            "cases": self.cases(), "mutations": self.mutations(), "complaints": self.complaints,
        }  # fmt: skip
        (RESULTS / "emulation.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
        versions = ", ".join(f"{name} {number}" for name, number in machine.items())
        head = (
            f"Written by `make emulate` on {today} with {versions}. How to read it: [Proof without a GPU](../proof.md)."
        )
        if len(self.rows) < tasks:
            head += f" **Not finished: {len(self.rows):,} of {tasks:,} tasks**; the command goes on where it ended."
        text = f"# Executed without a GPU\n\n{head}\n\n"
        (RESULTS / "emulation.md").write_text(f"{text}{self.page()}\n", "utf-8")


def summed(rows: list[Row]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    errors: Counter[str] = Counter(dict.fromkeys(FINDINGS, 0))
    notes: Counter[str] = Counter()
    largest: dict[str, float] = {}
    for row in rows:
        counts.update(row.counts)
        for finding, times in row.findings.items():
            if finding in names("notes"):
                notes[finding] += times
            else:
                errors[category(finding)] += times
        for name, size in row.errors.items():
            largest[name] = max(size, largest.get(name, 0.0))
    complaints = sum(len(row.complaints) for row in rows)
    return {**counts, **errors, "notes": dict(notes), **largest, "complaints": complaints}

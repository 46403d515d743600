"""`python tests/facilities.py`: runs the tests that show a facility of PyTorch and prints their table.

Without arguments the table also goes into docs/facilities.md; arguments go on to pytest (`-k export`, `-x`).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

DOCUMENT = Path(__file__).parent.parent / "docs" / "facilities.md"
START, END = "<!-- table: make facilities -->", "<!-- end of the table -->"
TITLES = {"cpu": "CPU", "interpreter": "interpreter", "gpu": "GPU"}


class Collector:
    """Notes which facility every test shows, where it runs, and how it ended."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, dict[str, Counter[str]]]] = {}
        self.tests: dict[str, tuple[str, str, str]] = {}
        self.compile_cost: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("facility")
            if marker is None:
                continue
            name, *place = marker.args
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            where = place[0] if place else parameters.get("place", "gpu" if item.get_closest_marker("gpu") else "cpu")
            test = f"{item.path.name}::{item.originalname}"  # type: ignore[attr-defined]
            self.tests[item.nodeid] = name, where, test
            self.cells.setdefault(name, {}).setdefault(where, defaultdict(Counter))
        items[:] = [item for item in items if item.nodeid in self.tests]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, where, test = self.tests[report.nodeid]
        if report.when == "call" or report.outcome != "passed":
            self.cells[name][where][test][report.outcome] += 1
        self.compile_cost |= dict(report.user_properties).get("cost", {}) if report.when == "call" else {}

    def table(self) -> str:
        lines = ["| facility | " + " | ".join(TITLES.values()) + " |", "| --- | --- | --- | --- |"]
        for name in self.cells:
            lines.append(f"| {name} | " + " | ".join(self.cell(name, place) for place in TITLES) + " |")
        return "\n".join(lines)

    def cell(self, name: str, place: str) -> str:
        return "<br>".join(verdict(test, n) for test, n in self.cells[name].get(place, {}).items()) or "–"

    def provenance(self) -> str:
        versions = [f"{name} {version(name)}" for name in ("torch", "triton", "onnxruntime")]
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        machine = f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, {gpu}"
        lines = [f"Run on {datetime.date.today().isoformat()} with {', '.join(versions)}, {machine}."]
        if self.compile_cost:
            lines.append(
                "Compiling SeqResNet-B42's training step, forward, backward and the first step, from empty caches: "
                f"{self.compile_cost['nodes']} graph nodes, {self.compile_cost['processor']:.0f} s of processor time, "
                f"{self.compile_cost['wall']:.0f} s by the clock beside whatever else the machine was doing."
            )
        return "\n".join(lines)


def verdict(test: str, outcomes: Counter[str]) -> str:
    """A test's outcome over all its cases: failed if one did, not run if none was, and how many were not."""
    if outcomes["failed"]:
        return f"✗ `{test}`"
    if not outcomes["passed"]:
        return f"not run: `{test}`"
    missing = f" ({outcomes['skipped']} of {outcomes.total()} cases not run)" if outcomes["skipped"] else ""
    return f"✓ `{test}`{missing}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    collector = Collector()
    status = pytest.main([str(Path(__file__).parent), "--every-model", *sys.argv[1:]], plugins=[collector])
    table = f"{collector.table()}\n\n{collector.provenance()}"
    print(table)
    if len(sys.argv) > 1:
        print(f"{DOCUMENT.name} is as it was: not all tests were asked for.")
        return int(status)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    temporary = DOCUMENT.with_suffix(".part")
    temporary.write_text(f"{before}{START}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    temporary.replace(DOCUMENT)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())

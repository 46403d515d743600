"""`python tests/facilities.py`: runs the tests that show a facility of PyTorch and prints their table.

Without arguments the table also goes into docs/facilities.md; arguments go on to pytest (`-k export`, `-x`).
`--libraries` (make libraries) runs the tests that meet other people's libraries, and writes their table instead.
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
# Tests that a library of other people's has to be installed for, and those libraries.
LIBRARY_TESTS = ("test_libraries.py", "test_timm.py", "test_timm_training.py", "test_convert.py", "test_quantised.py")
LIBRARIES = (
    "timm", "torchvision", "accelerate", "fvcore", "safetensors", "ptflops", "thop", "torchao", "captum",
    "torch-pruning",
)  # fmt: skip
TITLES = {"cpu": "CPU", "interpreter": "interpreter", "gpu": "GPU"}


class Collector:
    """Notes which facility every test shows, where it runs, and how it ended."""

    def __init__(self, libraries: bool) -> None:
        self.libraries, self.outcomes = libraries, Counter[str]()
        self.cells: dict[str, dict[str, dict[str, Counter[str]]]] = {}
        self.tests: dict[str, tuple[str, str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("facility")
            if marker is None or (item.path.name in LIBRARY_TESTS) != self.libraries:
                continue
            name, *place = marker.args
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            where = place[0] if place else parameters.get("place", "gpu" if item.get_closest_marker("gpu") else "cpu")
            test = f"{item.path.name}::{item.originalname}"
            self.tests[item.nodeid] = name, where, test
            self.cells.setdefault(name, {}).setdefault(where, defaultdict(Counter))
        if not self.libraries:
            items[:] = [item for item in items if item.nodeid in self.tests]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        counts = report.when == "call" or report.outcome != "passed"
        self.outcomes[report.outcome] += counts
        if report.nodeid not in self.tests:
            return
        name, where, test = self.tests[report.nodeid]
        if counts:
            self.cells[name][where][test][report.outcome] += 1

    def table(self) -> str:
        lines = ["| facility | " + " | ".join(TITLES.values()) + " |", "| --- | --- | --- | --- |"]
        for name in self.cells:
            lines.append(f"| {name} | " + " | ".join(self.cell(name, place) for place in TITLES) + " |")
        return "\n".join(lines)

    def cell(self, name: str, place: str) -> str:
        return "<br>".join(verdict(test, n) for test, n in self.cells[name].get(place, {}).items()) or "–"

    def provenance(self) -> str:
        names = ("torch", *LIBRARIES) if self.libraries else ("torch", "triton", "onnxruntime")
        versions = [f"{name} {version(name)}" for name in names]
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        machine = f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, {gpu}"
        lines = [f"Run on {datetime.date.today().isoformat()} with {', '.join(versions)}, {machine}."]
        if self.libraries:
            counted = (f"{self.outcomes[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))
            lines.append(f"All tests of {', '.join(f'`{name}`' for name in LIBRARY_TESTS)}: {', '.join(counted)}.")
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


def write(page: Path, start: str, table: str) -> None:
    """Put a table between its marker and the end of the table there."""
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(END)
    temporary = page.with_suffix(".part")
    temporary.write_text(f"{before}{start}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    temporary.replace(page)


def main(arguments: list[str]) -> int:
    libraries = "--libraries" in arguments
    arguments = [argument for argument in arguments if argument != "--libraries"]
    collector = Collector(libraries)
    folder = Path(__file__).parent
    asked = [str(folder / name) for name in LIBRARY_TESTS] if libraries else [str(folder), "--every-model"]
    status = pytest.main([*asked, *arguments], plugins=[collector])
    table = f"{collector.table()}\n\n{collector.provenance()}"
    print(table)
    if arguments:
        print(f"{DOCUMENT.name} is as it was: not all tests were asked for.")
        return int(status)
    write(DOCUMENT, START.replace("facilities", "libraries") if libraries else START, table)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

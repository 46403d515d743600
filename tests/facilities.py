"""`python tests/facilities.py`: runs the tests that show a facility of PyTorch; prints their table, also into docs."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

DOCUMENT = Path(__file__).parent.parent / "docs" / "facilities.md"
START, END = "<!-- table: make facilities -->", "<!-- end of the table -->"
PLACES = ("cpu", "interpreter", "gpu")
# A cell's verdict is the worst of its tests'; a test that is skipped shows nothing.
ORDER = ("failed", "passed", "skipped")
SIGNS = {"failed": "✗", "passed": "✓", "skipped": "not run"}


class Collector:
    """Notes which facility every test shows, where it runs, and how it ended."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, dict[str, set[str]]]] = {}
        self.tests: dict[str, tuple[str, str, str]] = {}

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
            self.cells.setdefault(name, {}).setdefault(where, defaultdict(set))
        items[:] = [item for item in items if item.nodeid in self.tests]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, where, test = self.tests[report.nodeid]
        if report.when == "call" or report.outcome != "passed":
            self.cells[name][where][test].add(report.outcome)

    def table(self) -> str:
        lines = ["| facility | CPU | interpreter | GPU |", "| --- | --- | --- | --- |"]
        for name in self.cells:
            lines.append(f"| {name} | " + " | ".join(self.cell(name, place) for place in PLACES) + " |")
        return "\n".join(lines)

    def cell(self, name: str, place: str) -> str:
        shown = []
        for test, outcomes in self.cells[name].get(place, {}).items():
            shown.append(f"{SIGNS[next(o for o in ORDER if o in outcomes)]} `{test.removeprefix('test_')}`")
        return "<br>".join(shown) or "–"


def compile_cost() -> str:
    """Graph nodes and seconds to compile SeqResNet-B42 for a training step, from empty caches."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.utils import fresh_inductor_cache

    import seqconv_triton as sct

    nodes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nodes.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return compile_fx(graph, inputs)

    model, x = sct.SeqResNetB42(), torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    with fresh_inductor_cache():
        torch._dynamo.reset()
        start = time.perf_counter()
        torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
        seconds = time.perf_counter() - start
    return (
        f"Compiling SeqResNet-B42's training step, forward and backward, from empty caches with "
        f"{torch.get_num_threads()} threads, first step included: {seconds:.0f} s, {nodes[-1]} graph nodes."
    )


def main() -> int:
    collector = Collector()
    status = pytest.main([str(Path(__file__).parent), *sys.argv[1:]], plugins=[collector])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    table = f"{collector.table()}\n\nRun with torch {torch.__version__} on {gpu}. {compile_cost()}\n"
    print(table)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{START}\n\n{table}\n{END}{after}", encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())

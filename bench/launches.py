"""What the Triton backend launches in a pass over a model, and what this library's own Python costs a launch.

Counted on meta tensors, so that no GPU is needed: each launch is noted instead of made. The time in the table is that
of a first pass's launch order, without Triton's dispatch; later passes are replayed (`host.py`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import seqconv_triton as sct
from bench.results import FOLDER, provenance, write_json
from bench.tables import machine
from seqconv_triton.nn.layers import PackedSeqConv

MODELS = ("seqresnet_b22", "seqresnet_b42", "seqresnext_24")
ROUNDS = 7
FILE = FOLDER / "launches.json"
REPLAYED = "B42's groups, replayed"


def passes(name: str, training: bool) -> list[list[Any]]:
    """The stages' forward passes and, in training, their backward passes."""
    from seqconv_triton.tools.ahead import stage_inputs, stage_passes

    model = sct.create_model(name, device="meta")
    inputs = stage_inputs(model, (8, 3, 224, 224))
    runs = [stage_passes(stage, torch.empty(size, device="meta").bfloat16(), training) for stage, size in inputs]
    return [list(column) for column in zip(*runs, strict=True)]


def measure(runs: list[Any]) -> tuple[int, float]:
    """Launches, and the median seconds of making them all."""
    from seqconv_triton.kernels import launch

    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    seconds = []
    with launch.listen(note):
        for _ in range(ROUNDS + 1):
            count = 0
            start = time.perf_counter()
            for run in runs:
                run()
            seconds.append(time.perf_counter() - start)
    return count, statistics.median(seconds[1:])


def table() -> list[dict[str, Any]]:
    """Print a row for each model and pass, and return them."""
    from bench import host

    rows = []
    print(f"{'model':<16}{'pass':<20}{'groups':>7}{'launches':>10}{'own Python a launch':>22}")
    for name in MODELS:
        model = sct.create_model(name, device="meta")
        groups = sum(len(m.plan.groups) for m in model.modules() if isinstance(m, PackedSeqConv))
        columns = [("evaluation", passes(name, False)[0])]
        columns += zip(("training, forward", "training, backward"), passes(name, True), strict=True)
        for kind, runs in columns:
            launches, seconds = measure(runs)
            own = seconds / launches * 1e6
            rows.append({"model": name, "pass": kind, "groups": groups, "launches": launches, "microseconds": own})
            print(f"{name:<16}{kind:<20}{groups:>7}{launches:>10}{own:>19.1f} µs")
    for training in (False, True):
        launches, dispatched, own = host.microseconds(training)
        kind = "training step" if training else "evaluation"
        print(f"{kind}, replayed on an idle driver: {launches} launches ({dispatched} by Triton), {own:.1f} µs each")
        row = {"model": REPLAYED, "pass": kind, "launches": launches, "dispatched": dispatched, "microseconds": own}
        rows.append(row)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=FILE, help="results file (default: bench/results/launches.json)")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    rows = table()
    write_json(arguments.output, {"provenance": provenance(torch.device("cpu")), "launches": rows})
    return 0


def markdown(contents: dict[str, Any] | None) -> str:
    """Python a launch of both passes, for docs/performance.md."""
    if contents is None:
        return "Not measured yet: `python -m bench launches` writes this part.\n"
    lines = ["| B42's groups | launches | dispatched by Triton | Python a launch |", "| --- | --- | --- | --- |"]
    for row in contents["launches"]:
        if row["model"] == REPLAYED:
            cells = row["pass"], row["launches"], row["dispatched"], f"{row['microseconds']:.1f} µs"
            lines.append(f"| {' | '.join(map(str, cells))} |")
    source = contents["provenance"]
    where = f"On one core: {machine(contents)}, triton {source['triton']}, {source['date']}, {source['revision']}."
    return "\n".join([*lines, "", where]) + "\n"

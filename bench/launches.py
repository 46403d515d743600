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
from bench import host
from bench.results import Results, provenance
from seqconv_triton.kernels import launch
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.tools.ahead import stage_inputs, stage_passes

MODELS = ("seqresnet_b22", "seqresnet_b42", "seqresnext_24")
ROUNDS = 7


def passes(name: str, training: bool) -> list[list[Any]]:
    """The stages' forward passes and, in training, their backward passes."""
    model = sct.create_model(name, device="meta")
    inputs = stage_inputs(model, (8, 3, 224, 224))
    runs = [stage_passes(stage, torch.empty(size, device="meta").bfloat16(), training) for stage, size in inputs]
    return [list(column) for column in zip(*runs, strict=True)]


def measure(runs: list[Any]) -> tuple[int, float]:
    """Launches, and the median seconds of making them all."""
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
        launches, own = host.microseconds(training)
        kind = "training step" if training else "evaluation"
        print(f"{kind}, replayed on an idle driver: {launches} launches, {own:.1f} µs each")
        rows.append({"model": "B42's groups, replayed", "pass": kind, "launches": launches, "microseconds": own})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="also write the counts as JSON")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    rows = table()
    if arguments.output is not None:
        Results(arguments.output, {"provenance": provenance(torch.device("cpu")), "launches": rows})
    return 0

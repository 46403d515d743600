"""`python -m bench compare A.json B.json`: how the times of two runs differ, row by row."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.report import milliseconds
from bench.results import load, median, timed


def compare(first: Path, second: Path) -> str:
    """A line for every row that both have, with B's speed over A's. Raises BadResults for other files."""
    a, b = load(first), load(second)
    before, after = timed(a["rows"]), timed(b["rows"])
    lines = []
    for name in ("processor", "gpu", "threads", "processes", "torch", "triton", "revision", "date"):
        left, right = (c["provenance"].get(name) for c in (a, b))
        if left != right:
            lines.append(f"{name}: {left} | {right}")
    lines.append(f"{'subject':<44}{'part':<9}{'batch':>6}  {'contender':<24}{'A':>10}{'B':>10}{'A / B':>8}")
    shared = [key for key in before if key in after]
    for key in shared:
        subject, part, batch, dtype, contender = key
        old, new = median(before[key]), median(after[key])
        assert old is not None and new is not None
        lines.append(
            f"{f'{subject}, {dtype}':<44}{part:<9}{batch:>6}  {contender:<24}{milliseconds(old):>7} ms"
            f"{milliseconds(new):>7} ms{old / new:>8.2f}"
        )
    alone = [len(before) - len(shared), len(after) - len(shared)]
    lines.append(f"{len(shared)} rows in both; {alone[0]} only in A, {alone[1]} only in B")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="A.json")
    parser.add_argument("second", type=Path, metavar="B.json")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    print(compare(arguments.first, arguments.second))
    return 0

"""`python -m bench compiled`: every kernel of every model, compiled for every architecture and dtype, and what spills.

Into bench/results/compiled.json, from which docs/performance.md takes its table. No GPU is needed, but two hours of two
cores: each finished pair of architecture and dtype is kept, and counts as long as what it launches is what it was. When
`tools/ahead.py` reads what was compiled in another way, `--fresh`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

import torch

import seqconv_triton as sct
from bench.launched import described, fingerprint
from bench.report import say
from bench.results import FOLDER, Row, provenance, read_json, write_json
from seqconv_triton.kernels.heuristic import TWO_STAGES
from seqconv_triton.tools.arguments import ARCHITECTURES, DTYPES

if TYPE_CHECKING:
    from seqconv_triton.tools.ahead import Launch

FILE = FOLDER / "compiled.json"
BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="*", choices=ARCHITECTURES, default=ARCHITECTURES, help="some of them")
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=list(DTYPES), help="some of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--fresh", action="store_true", help="compile anew what the file has")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    rows = {(row["architecture"], row["dtype"]): row for row in (read_json(FILE) or {"rows": []})["rows"]}
    order = [(architecture, dtype) for architecture in ARCHITECTURES for dtype in DTYPES]
    asked = [pair for pair in order if pair[0] in arguments.arch and pair[1] in arguments.dtype]
    kept = {} if arguments.fresh else dict(rows)
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compile_pair, *pair, kept.get(pair)) for pair in asked]):
            row = done.result()
            rows[row["architecture"], row["dtype"]] = row
            write_json(FILE, {"models": sct.list_models(), "rows": [rows[pair] for pair in order if pair in rows]})
            say(f"{row['architecture']} {row['dtype']}: {row['kernels']} kernels, {len(row['faults'])} faults")
            for fault in row["faults"]:
                say(f"    {fault}")
    return int(any(row["faults"] for row in rows.values()))


def launched(architecture: str, dtype: str) -> dict[Launch, str]:
    """Every distinct kernel that training and evaluation of any model launches there, with the first such model."""
    from seqconv_triton.tools.ahead import launches

    found: dict[Launch, str] = {}
    for name in sct.list_models():
        model = sct.create_model(name, device="meta")
        for item in launches(model, model.image_size, BATCH, DTYPES[dtype], architecture):
            found.setdefault(item, name)
    return found


def holds(row: Row) -> bool:
    """Whether a row is about the kernels as they are."""
    code: str = row["code"]
    return code == fingerprint(map(described, launched(row["architecture"], row["dtype"])))


def compile_pair(architecture: str, dtype: str, before: Row | None) -> Row:
    """A row about `launched`; `before`, if it still holds."""
    from seqconv_triton.tools.ahead import SHARED_LIMIT, compile_launch

    started, source = time.perf_counter(), provenance(torch.device("cpu"))
    found = launched(architecture, dtype)
    code = fingerprint(map(described, found))
    if before is not None and before["code"] == code:
        return before
    faults, instructions, largest, narrow = [], Counter[str](), 0, 0
    for item, name in found.items():
        result = compile_launch(item, architecture)
        largest = max(largest, result.shared)
        is_matrix = item.name in TWO_STAGES
        narrow += is_matrix and result.narrow_loads > 0  # a tile of 16 × 16 has one element for every lane of AMD's
        instructions[result.instruction if is_matrix else "elementwise"] += 1
        wrong = {
            f"spills {result.spills} {'registers' if architecture.startswith('gfx') else 'bytes'}": result.spills > 0,
            f"{result.shared} bytes of shared memory": result.shared > SHARED_LIMIT[architecture],
            "no matrix instruction": is_matrix and result.instruction == "-",
        }
        if any(wrong.values()):
            said = ", ".join(what for what, is_so in wrong.items() if is_so)
            faults.append(f"{item.name} of {name}: {said}; {describe(item)}")
    return {
        "architecture": architecture, "dtype": dtype, "triton": source["triton"], "date": source["date"], "code": code,
        "kernels": len(found),
        "instructions": dict(instructions), "largest_shared": largest, "narrow": narrow, "faults": faults,
        "seconds": round(time.perf_counter() - started),
    }  # fmt: skip


def describe(item: Launch) -> str:
    sides = ", ".join(f"{name} {value}" for name, value in item.constants if isinstance(value, int) and value)
    return f"{sides}, {item.num_warps} warps, {item.num_stages} stages"


def markdown(found: dict[str, Any] | None) -> str:
    """The table of docs/performance.md."""
    if found is None:
        return "Not compiled yet: `python -m bench compiled` writes this table.\n"
    heads = ("", "kernels", "by matrix instruction", "most shared memory", "load single elements", "faults")
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * 5]
    for row in found["rows"]:
        by_kind = ", ".join(f"{count} {kind}" for kind, count in sorted(row["instructions"].items()))
        name, shared = f"{row['architecture']}, {row['dtype']}", f"{row['largest_shared'] / 1024:.0f} KiB"
        narrow = "–" if row["dtype"] == "float32" else row["narrow"]  # loads of 16 bits are counted
        lines.append(f"| {name} | {row['kernels']} | {by_kind} | {shared} | {narrow} | {len(row['faults'])} |")
    said = [f"- {row['architecture']}, {row['dtype']}: {f}" for row in found["rows"] for f in row["faults"]]
    sources = sorted({f"triton {row['triton']}, {row['date']}" for row in found["rows"]})
    tail = f"\nCompiled with {'; '.join(sources)}: {len(found['models'])} models.\n"
    return "\n".join([*lines, *(["", *said] if said else []), tail])

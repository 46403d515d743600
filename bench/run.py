"""`python -m bench run`: a table of cases on this machine, on the screen and as JSON, then the plots."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench import ceilings, report
from bench.cases import TABLES, Case, chosen
from bench.results import FOLDER, BadResults, Results, Row, provenance
from bench.runner import NO_TIME, POISONED, Poisoned, run_cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", choices=TABLES, default="cpu", help="which table of cases.py (default: cpu)")
    parser.add_argument("--full", action="store_true", help="the long CPU table: B42's compiled reference, an hour")
    parser.add_argument(
        "--only", default=[""], nargs="+", metavar="TEXT", help="only cases with one TEXT in their names"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--minutes", type=float, help="begin no case after so many minutes")
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/TABLE.json)")
    parser.add_argument("--no-plots", action="store_true", help="write the results file only")
    parser.add_argument("--append", action="store_true", help="go on where the results file ends")
    parser.add_argument("--warm", action="store_true", help="let compilation caches help")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    table = "cpu-full" if arguments.full else arguments.cases
    device = torch.device("cuda" if table == "gpu" else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("the gpu table needs a GPU, and torch sees none (python -m bench gpu --dry-run needs none)")
    cases = chosen(table, arguments.only)
    if not cases:
        raise SystemExit(f"no case of the table {table} has {' or '.join(map(repr, arguments.only))} in its name")
    torch.set_num_threads(arguments.threads)
    output = arguments.output or default_output(table)
    try:
        results = measure(cases, device, output, arguments.minutes, not arguments.warm, arguments.append)
    except Poisoned as error:
        report.say(f"the GPU is lost to this process since {error}")
        os._exit(POISONED)  # an orderly exit would touch the GPU
    report.say(f"\nwritten: {output}")
    if not arguments.no_plots:
        from bench.plots import draw

        for path in draw(results.contents, output.with_suffix("")):
            report.say(f"drawn: {path}")
    unfit = [row for row in results.contents["rows"] if "wrong" in row or "failed" in row]
    for row in unfit:
        report.say(f"{row['subject']}, batch {row['batch']}: {report.line(row, None)}")
    return 1 if unfit else 0


def default_output(table: str) -> Path:
    """Quick runs, whose times mean nothing, stay out of the results' folder."""
    return Path("out/bench-quick.json") if table == "quick" else FOLDER / f"{table}.json"


def measure(
    cases: Sequence[Case],
    device: torch.device,
    output: Path,
    minutes: float | None = None,
    cold: bool = True,
    append: bool = False,
) -> Results:
    """Run cases into a results file that is whole after every case; `append` goes on where one ends.

    Raises Poisoned, and BadResults where it should go on with a file of other cases.
    """
    start = time.monotonic()
    source = provenance(device)
    if device.type == "cpu":
        source["processes"] = "own"
    identities = [case.identity for case in cases]
    results = reopened(output, identities) if append else Results(output, {"provenance": source, "cases": identities})
    before = results.contents.get("seconds", 0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limits = asdict(ceilings.measure(device, dtype)) | {"dtype": str(dtype).removeprefix("torch.")}
    if device.type == "cuda":
        limits["launch_seconds"] = ceilings.launch_seconds(device)
    results.set(ceilings=limits)
    report.say(report.heading(results.contents))
    deadline = None if minutes is None else start + 60 * minutes

    def keep_time() -> None:
        results.set(seconds=round(before + time.monotonic() - start, 1))

    def show(case: Case, rows: list[Row]) -> None:
        keep_time()
        report.show(case, rows)

    with report.progress(list(cases)) as shown:
        run_cases(shown, device, results, show, deadline, cold)
    results.set(counts=counts({case.subject for case in cases}))
    keep_time()
    return results


def reopened(path: Path, identities: list[str]) -> Results:
    """A results file to go on with, without the rows that only say that no time was left. Raises BadResults."""
    results = Results.reopen(path)
    begun = any("case" in row for row in results.contents["rows"])  # rows know their case by its number
    if begun and results.contents.get("cases") != identities:
        raise BadResults(f"{path} was begun with other cases: --append needs the same ones")
    rows = [row for row in results.contents["rows"] if row.get("not_measured") != NO_TIME]
    results.set(rows=rows, cases=identities)
    return results


def counts(subjects: set[str]) -> dict[str, dict[str, int]]:
    """What needs no clock: parameters, their tensors here and in the published layout, bytes kept for backward."""
    import seqconv_triton as sct
    from seqconv_triton.tools.info import summarize

    found = {}
    for name in sorted(subjects & set(sct.list_models())):
        summary = summarize(name)
        published = sct.export_published(sct.create_model(name))
        parameters = [key for key in published if not key.endswith(("running_mean", "running_var", "batches_tracked"))]
        found[name] = {
            "parameters": summary.parameters,
            "parameter_tensors": summary.parameter_tensors,
            "published_parameter_tensors": len(parameters),
            "kept_bytes": summary.kept_bytes,
            "kept_bytes_reference": summary.kept_bytes_reference,
            "multiply_adds": summary.multiply_adds,
        }
    return found

"""`python -m bench gpu` (`make gpu`): all GPU tests, then the GPU table, within nine minutes; results always written.

The table runs in a process of its own, which a wrong kernel may kill and the clock may stop: every case that is through
is in the file by then, and a new process goes on behind the one that failed. Meanwhile compilation, which needs cores
and not the GPU, happens beside the tests. `--dry-run` needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import startup
from bench.cases import MODELS, TABLES, Case, chosen
from bench.peers import PEERS
from bench.processes import Background, python, spawn
from bench.report import line
from bench.results import FOLDER, Results, Row, provenance
from bench.runner import NO_TIME, POISONED, identity
from seqconv_triton.backend import has_triton

PREPARATION = 0.4  # of the time: tests, and compilation beside them
# Tuning, and what is skipped beside a CPU's torch, where timm and torchvision cannot be imported.
FURTHER = ("timm.py", "convert.py", "convert_choice.py", "train_vision.py", "tuning.py::test_tuning_on_a_gpu")
FURTHER_SECONDS = 60.0  # that the table waits for them, within the time of the preparation
RESTARTS = 5


def prepare(results: Results, deadline: float) -> None:
    """The GPU tests, and beside them what the table would compile; start-up times, too, come from processes.

    Last come further tests, which cannot take more than what is left of the preparation.
    """
    if slower := unfenced():
        results.note(slower)
        print(slower, flush=True)
    running = {"tests": tests("tests/test_gpu.py", "tests", "-m", "gpu", "--ignore=tests/test_tuning.py")}
    running |= {name: spawn(python("bench", "gpu", "--warm", name)) for name in (*MODELS, "peers", "reference")}
    try:
        for row in startup.measure(timeout=max(1.0, (deadline - time.monotonic()) / 2)):
            results.add(row)
            text = f"failed: {row['failed']}" if "failed" in row else f"{row['median']:.1f} s"
            print(f"start-up, {row['contender']}: {text}", flush=True)
        for name, process in running.items():
            if name == "tests":
                continue
            status = process.end_by(deadline)
            if status != 0:
                why = ["stopped, no time left" if status is None else f"ended with {status}", *process.lines()[-3:]]
                results.note(f"compiling ahead, {name}: {'; '.join(why)}")
                print(f"compiling ahead, {name}:", *why, sep="\n  ", flush=True)
        results.set(tests=outcome("GPU tests", running["tests"], deadline))
        running["further"] = tests(*(f"tests/test_{name}" for name in FURTHER))
        end = min(deadline, time.monotonic() + FURTHER_SECONDS)
        results.set(further_tests=outcome("further tests (timm, torchvision, tuning)", running["further"], end))
    finally:
        for process in running.values():
            process.kill()


def unfenced() -> str:
    """Why kernels are slower than they need be with this version of Triton, if they are."""
    if not has_triton():
        return ""
    from seqconv_triton.kernels.configs import architecture
    from seqconv_triton.kernels.heuristic import loads_ahead

    slower = not loads_ahead(architecture(torch.device("cuda")))
    return "kernels do not load ahead with this version of Triton: docs/proof.md, Known limits" if slower else ""


def tests(*which: str) -> Background:
    workers = ["-n", "6", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    return spawn(python("pytest", *which, "-q", "-p", "no:cacheprovider", *workers))


def outcome(what: str, process: Background, deadline: float) -> dict[str, Any]:
    """How tests ended, printed too; not passed where they had to be stopped."""
    status = process.end_by(deadline)
    lines = process.lines()
    summary = (lines or [""])[-1] if status is not None else "stopped, no time left"
    print(*lines[-3 if status == 0 else -60 :], f"{what}: {summary}", sep="\n", flush=True)
    return {"passed": status == 0, "summary": summary, "failures": failures(lines)}


def failures(lines: Sequence[str]) -> list[str]:
    return [text for text in lines if text.startswith(("FAILED", "ERROR"))]


def warm(name: str) -> None:
    """Compile into the caches on disk: a model's kernels, the peers, or the reference under torch.compile."""
    from bench import contenders, peers, subjects
    from bench.timing import unmarked

    device = torch.device("cuda")
    # The tests need their share of the memory. What fails for want of it is compiled by then.
    torch.cuda.set_per_process_memory_fraction({"peers": 0.25, "reference": 0.4}.get(name, 0.1))
    for case in warmed(name):
        for label in case.contenders:
            try:
                base, shape = subjects.make(case.subject, case.image)
                x = subjects.random_input(shape, case.batch, device)
                contenders.build(label, case, base, x).run(unmarked)
            except peers.NotInstalled as reason:
                print(reason)
            except torch.OutOfMemoryError:
                print(f"{case.name}, {label}: out of memory once compiled")
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def warmed(name: str) -> list[Case]:
    """What the table will compile, each once. Triton's kernels do not depend on the batch."""
    if name in MODELS:
        return [Case(name, training, 16, ("ours eager",), dtype="bfloat16") for training in (False, True)]
    found: dict[tuple[object, ...], Case] = {}
    for case in TABLES["gpu"]():
        for label in case.contenders:
            who, how = label.split()
            if how == "compiled" and (who in PEERS if name == "peers" else who == name):
                key = (label, case.training, case.batch, "" if who in PEERS else case.subject)
                found.setdefault(key, replace(case, contenders=(label,)))
    return list(found.values())


def table(output: Path, cases: Sequence[Case], deadline: float, command: Sequence[str]) -> None:
    """Run the cases in child processes until all are through or the time is; what is missing gets rows that say so."""
    for _ in range(RESTARTS + 1):
        child = spawn([*command, "--output", str(output), "--append", "--no-plots"], quiet=False)
        code = child.end_by(deadline)
        if code is None:
            break
        left = [i for i in range(len(cases)) if i not in done(output)]
        if not left:
            break
        if code != POISONED:  # it died in the case that it was at
            fill(output, cases, left[:1], {"failed": f"the process ended with {code}"})
    left = [i for i in range(len(cases)) if i not in done(output)]
    fill(output, cases, left, {"not_measured": NO_TIME})


def done(output: Path) -> set[int]:
    return {row["case"] for row in Results.reopen(output).contents["rows"] if "case" in row}


def fill(output: Path, cases: Sequence[Case], which: Sequence[int], reason: Row) -> None:
    results = Results.reopen(output)
    for i in which:
        for label in cases[i].contenders:
            results.add(identity(cases[i], label) | reason | {"case": i})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=8.7, help="of all together (default: 8.7)")
    parser.add_argument("--output", type=Path, default=FOLDER / "gpu.json", help="results file")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: launches and rooflines of every GPU case")
    parser.add_argument(
        "--compile",
        metavar="ARCH",
        help="dry run: also compile every kernel for sm_90, gfx942, …, and count instructions",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--warm", metavar="NAME", help=argparse.SUPPRESS)


def run_from_arguments(arguments: argparse.Namespace) -> int:
    cases = chosen("gpu", [arguments.only])
    if arguments.dry_run or arguments.compile:
        from bench.dry import dry_run

        return dry_run(cases, arguments.compile)
    if not torch.cuda.is_available():
        print("python -m bench gpu needs a GPU, and torch sees none; --dry-run needs none", file=sys.stderr)
        return 2
    if arguments.warm:
        warm(arguments.warm)
        return 0
    begin, total = time.monotonic(), 60 * arguments.minutes
    identities = [case.identity for case in cases]  # by which its runs know the file again
    results = Results(arguments.output, {"provenance": provenance(torch.device("cuda")), "cases": identities})
    try:
        prepare(results, begin + PREPARATION * total)
    except Exception as error:  # the measurements matter more
        results.note(f"preparation: {type(error).__name__}: {error}")
    command = [*python("bench", "run"), "--cases", "gpu", "--warm", "--only", arguments.only]
    table(arguments.output, cases, begin + total - 15, command)
    return conclude(arguments.output)


def conclude(output: Path) -> int:
    """The kernels' times against what was counted, goals and plots; 1 if a test failed or a result was wrong."""
    from bench.bounds import text
    from bench.goals import goals

    results = Results.reopen(output)
    print("", text(results.contents), goals(results.contents), sep="\n")
    print(f"written: {output}")
    try:
        from bench.plots import draw

        draw(results.contents, output.with_suffix(""))
    except ImportError as error:
        print(error, file=sys.stderr)
    bad = [row for row in results.contents["rows"] if "wrong" in row or "failed" in row]
    for row in bad:
        print(f"{row['subject']}, batch {row['batch']}: {line(row, None)}")
    passed = all(results.contents.get(name, {}).get("passed", False) for name in ("tests", "further_tests"))
    return int(bool(bad) or not passed)

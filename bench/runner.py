"""Run cases: build every contender, check its results, measure memory, time what is right in interleaved rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bench import check, memory, peers, subjects
from bench.cases import Case
from bench.ceilings import Ceilings
from bench.contenders import Contender, build
from bench.results import Results, Row
from bench.timing import Timing, cold_compilation, interleave

POISONED = 3  # exit status after an error that no later launch of this process can survive
FATAL = ("CUDA error", "HIP error", "illegal memory access", "device-side assert")


@dataclass
class Prepared:
    """A case's contenders that may be timed, what is known of them, and the rows of those that may not."""

    right: dict[str, Contender] = field(default_factory=dict)
    facts: dict[str, Row] = field(default_factory=dict)
    refused: list[Row] = field(default_factory=list)


Build = Callable[[str, Case, nn.Module, torch.Tensor], Contender]


def prepare(case: Case, device: torch.device, make_contender: Build = build, cold: bool = True) -> Prepared:
    """Build, run once and check; whoever fails, is wrong or is not installed gets a row that says so."""
    base, shape = subjects.make(case.subject, case.image)
    base = base.to(device)
    x = subjects.random_input(shape, case.batch, device)
    prepared, specifications = Prepared(), {}
    for label in case.contenders:
        row: Row = identity(case, label)
        try:
            who = check.family(label)
            if who in peers.PEERS:
                row["version"] = peers.label()
            if who not in specifications:
                specifications[who] = check.expected(who, case, base, x)
            contender = make_contender(label, case, base, x)
            start = time.perf_counter()
            if contender.compiled and cold and device.type == "cpu":
                with cold_compilation():
                    found = check.results_of(contender, case)
            else:
                found = check.results_of(contender, case)
                synchronize(device)
            if contender.compiled:
                row["compile_seconds"] = time.perf_counter() - start
                row["caches"] = "cold" if cold and device.type == "cpu" else "warm"
            row["error"] = specifications[who].check(found, case.dtype)
            if not label.endswith(" graph"):  # whose memory is a pool that no run changes
                row["peak_bytes"] = memory.peak(contender, device)
            if case.training and not contender.compiled:
                row["kept_bytes"] = memory.kept(contender)
            contender.results.clear()
            del found
        except peers.NotInstalled as reason:
            prepared.refused.append(row | {"not_measured": str(reason)})
        except check.Wrong as reason:
            prepared.refused.append(row | {"wrong": str(reason)})
        except Exception as error:  # the other contenders' rows must not be lost
            lines = str(error).strip().splitlines() or [""]
            prepared.refused.append(row | {"failed": f"{type(error).__name__}: {lines[0]}"})
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        else:
            prepared.right[label], prepared.facts[label] = contender, row
    return prepared


def identity(case: Case, label: str) -> Row:
    part = "step" if case.training else "eval"
    return {
        "subject": case.subject, "part": part, "batch": case.batch, "dtype": case.dtype, "contender": label,
        "image": case.image,
    }  # fmt: skip


def run_case(
    case: Case, device: torch.device, ceilings: Ceilings | None, make_contender: Build = build, cold: bool = True
) -> list[Row]:
    """All rows of a case: one a contender and part, those without a time last."""
    if case.subject.startswith("kernel "):
        from bench.kernel_runner import prepare_kernel

        prepared = prepare_kernel(case, device)
    else:
        prepared = prepare(case, device, make_contender, cold)
    work = counted(case) if ceilings is not None else {}
    timings = interleave({label: c.run for label, c in prepared.right.items()}, case.rounds, device)
    rows = []
    for label, by_part in timings.items():
        for part, timing in by_part.items():
            row = prepared.facts[label] | {"part": part}
            if part not in ("eval", "step"):
                row = {k: v for k, v in row.items() if k not in ("compile_seconds", "peak_bytes", "kept_bytes")}
            rows.append(row | figures(timing) | roofline_of(label, part, work, ceilings))
    prepared.right.clear()
    release(device)
    return rows + prepared.refused


def figures(timing: Timing) -> Row:
    lower, upper = timing.quartiles
    return {"seconds": timing.seconds, "median": timing.median, "lower": lower, "upper": upper}


def counted(case: Case) -> dict[str, Any]:
    """The Triton backend's launches by part, for the roofline; empty where Triton is not installed."""
    try:
        from bench.predict import case_work
    except ImportError:
        return {}
    return case_work(case)


def roofline_of(label: str, part: str, work: dict[str, Any], ceilings: Ceilings | None) -> Row:
    """Counted operations, bytes and launches beside ours; a step's are those of forward and backward together."""
    if ceilings is None or not work or not label.startswith("ours"):
        return {}
    from bench.roofline import predicted

    found = [w for name, items in work.items() if part in (name, "step") for w in items]
    return {
        "operations": sum(w.operations for w in found),
        "moved_bytes": sum(w.moved for w in found),
        "triton_launches": len(found),
        "roofline_seconds": predicted(found, ceilings)["roofline_seconds"],
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    """Give the case's memory and compiled code back before the next."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Poisoned(RuntimeError):
    """The GPU's context is lost: only a new process can go on."""


def run_cases(
    cases: Iterable[Case],
    device: torch.device,
    results: Results,
    show: Callable[[Case, list[Row]], None],
    deadline: float | None = None,
    cold: bool = True,
) -> None:
    """Every case in turn, its rows saved and shown as it ends; none begins that the deadline (time.monotonic) ends.

    Cases whose rows are in the results already, by number, are left out. Raises Poisoned, its case's rows saved.
    """
    found = results.contents.get("ceilings")
    ceilings = None if found is None else Ceilings(found["bytes_per_second"], found["operations_per_second"])
    through = {row["case"] for row in results.contents["rows"] if "case" in row}
    for number, case in enumerate(cases):
        if number in through:
            continue
        if deadline is not None and time.monotonic() + 60 * case.minutes > deadline:
            rows = [identity(case, label) | {"not_measured": "no time left"} for label in case.contenders]
        else:
            try:
                rows = run_case(case, device, ceilings, cold=cold)
            except Exception as error:
                line = (str(error).strip().splitlines() or [""])[0]
                failed = {"failed": f"{type(error).__name__}: {line}"}
                rows = [identity(case, label) | failed for label in case.contenders]
        results.extend([row | {"case": number} for row in rows])
        show(case, rows)
        if any(text in row.get("failed", "") for row in rows for text in FATAL):
            raise Poisoned(case.name)

"""Run cases: start every contender, check its results, time what is right in interleaved rounds, measure memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench import check, peers, subjects
from bench.cases import Case
from bench.ceilings import restored
from bench.contenders import Build, build, compiled
from bench.participants import Local, Participant, Setting, reason
from bench.results import Results, Row
from bench.timing import Timing, interleave
from bench.workers import Task, Worker
from seqconv_triton.tools.ceilings import Ceilings

POISONED = 3  # exit status after an error that no later launch of this process can survive
NO_TIME = "no time left"
FATAL = ("CUDA error", "HIP error", "illegal memory access", "device-side assert")
# Uncounted rounds: a young process's first runs meet memory that the system has yet to hand out.
WARM_UP = {"cuda": 1, "cpu": 2}


def setting(case: Case, device: torch.device, make_contender: Build, cold: bool, isolated: bool) -> Setting:
    """Contenders in processes of their own, or all in this one, with copies of one module and the same input."""
    if case.subject.startswith("kernel "):
        from bench import kernel_runner

        return kernel_runner.setting(case, device)
    base, shape = subjects.make(case.subject, case.image)
    base = base.to(device)
    x = subjects.random_input(shape, case.batch, device)

    def start(label: str, turn: int) -> Participant:
        if isolated:
            return Worker(Task(label, case, make_contender, cold, torch.get_num_threads(), turn))
        return Local(make_contender(label, case, base, x), case, device, cold)

    return Setting(start, lambda who: check.expected(who, case, base, x), case.processes if isolated else 1)


class Field:
    """A case under way: the participants that may be timed, what is known of them, and the rows of the others.

    Leaving the context ends all participants.
    """

    def __init__(self, case: Case, device: torch.device, where: Setting) -> None:
        self.case, self.device, self.where = case, device, where
        self.right: dict[str, Participant] = {}
        self.facts: dict[str, Row] = {}
        self.refused: list[Row] = []
        self.expected: dict[str, check.Expected] = {}

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *_: object) -> None:
        for participant in self.right.values():
            participant.close()
        self.right.clear()

    def enter(self, turn: int) -> None:
        """Start all contenders, or anew those who are right and cheap to start: compilation may take minutes."""
        for label in self.case.contenders if turn == 0 else [name for name in self.right if not compiled(name)]:
            if label in self.right:
                self.right.pop(label).close()
            row: Row = identity(self.case, label)
            try:
                who = check.family(label)
                if who in peers.PEERS:
                    row["version"] = peers.label()
                if who not in self.expected:
                    self.expected[who] = self.where.expected(who)
                row |= self.begin(label, turn, self.expected[who])
            except peers.NotInstalled as why:
                self.refused.append(row | {"not_measured": str(why)})
            except check.Wrong as why:
                self.refused.append(row | {"wrong": str(why)})
            except Exception as error:  # the other contenders' rows must not be lost
                self.refused.append(row | {"failed": reason(error)})
                if self.device.type == "cuda":
                    gc.collect()
                    torch.cuda.empty_cache()
            else:
                self.facts[label] = row

    def begin(self, label: str, turn: int, expected: check.Expected) -> Row:
        """Start a participant, run it once, check it: what its row has to say. Whoever is wrong ends at once."""
        participant = self.where.start(label, turn)
        try:
            facts, found = participant.first()
            error = expected.check(check.joined(found), check.precision_of(self.case, self.device))
        except BaseException:
            participant.close()
            raise
        self.right[label] = participant
        return facts | {"error": error}

    def fail(self, label: str, error: Exception) -> None:
        """Who fails later has no time either."""
        self.right.pop(label).close()
        self.refused.append(self.facts[label] | {"failed": reason(error)})


def identity(case: Case, label: str) -> Row:
    part = "step" if case.training else "eval"
    return {
        "subject": case.subject, "part": part, "batch": case.batch, "dtype": case.dtype, "contender": label,
        "image": case.image,
    }  # fmt: skip


def run_case(
    case: Case,
    device: torch.device,
    ceilings: Ceilings | None,
    make_contender: Build = build,
    cold: bool = True,
    isolated: bool = False,
) -> list[Row]:
    """All rows of a case: one a contender and part, those without a time last.

    `isolated`, on a CPU, gives every contender processes of its own, among which the rounds are divided;
    `make_contender` is then pickled.
    """
    work = counted(case, device) if ceilings is not None else {}
    timings: dict[str, dict[str, Timing]] = {}
    rows = []
    with Field(case, device, setting(case, device, make_contender, cold, isolated)) as field:
        turns = min(field.where.processes, case.rounds)
        for turn in range(turns):
            field.enter(turn)
            if turn == turns - 1:
                field.expected.clear()  # its memory may be what the runs need
            runs = {label: participant.run for label, participant in field.right.items()}
            for label, by_part in interleave(runs, -(-case.rounds // turns), WARM_UP[device.type], field.fail).items():
                for part, timing in by_part.items():
                    timings.setdefault(label, {}).setdefault(part, Timing()).seconds += timing.seconds
            del runs
        for label in [name for name in case.contenders if name in field.right]:
            try:
                facts = field.facts[label] | field.right[label].memory()
            except Exception as error:  # the others' rows must not be lost
                field.fail(label, error)
                continue
            for part, timing in timings[label].items():
                row = facts | {"part": part}
                if part not in ("eval", "step"):
                    row = {k: v for k, v in row.items() if k not in ("compile_seconds", "peak_bytes", "kept_bytes")}
                rows.append(row | figures(timing) | prediction(label, part, work, ceilings, case, device))
    refused = field.refused
    del field
    release(device)
    return rows + refused


def figures(timing: Timing) -> Row:
    lower, upper = timing.quartiles
    return {"seconds": timing.seconds, "median": timing.median, "lower": lower, "upper": upper}


def counted(case: Case, device: torch.device) -> dict[str, Any]:
    """The Triton backend's launches by part; empty where Triton is not installed."""
    try:
        from bench.predict import case_work
        from seqconv_triton.kernels.configs import architecture
    except ImportError:
        return {}
    return case_work(case, architecture(device))


def prediction(
    label: str, part: str, work: dict[str, Any], ceilings: Ceilings | None, case: Case, device: torch.device
) -> Row:
    """Counted operations, bytes and launches beside ours; a step's are those of forward and backward together.

    On a GPU also the time of the issue slots and the floor, of all launches and by kernel family.
    """
    if ceilings is None or not work or not label.startswith("ours"):
        return {}
    from bench.contenders import DTYPES
    from bench.roofline import countable, families, for_products_of, predicted
    from seqconv_triton.kernels.configs import architecture

    ceilings = for_products_of(DTYPES[case.dtype], ceilings)
    works = [w for name, items in work.items() if part in (name, "step") for w in items]
    row: Row = {
        "operations": sum(w.operations for w in works),
        "moved_bytes": sum(w.moved for w in works),
        "triton_launches": len(works),
        "roofline_seconds": predicted(works, ceilings)["roofline_seconds"],
    }
    name = architecture(device).partition(":")[0]
    if device.type != "cuda" or not countable(name):
        return row
    try:
        whole = predicted(works, ceilings, name)
        by_family = {
            family: {"launches": len(own)} | predicted(own, ceilings, name) for family, own in families(works)
        }  # fmt: skip
    except Exception as error:  # a time must not be lost for want of a count
        return row | {"not_counted": reason(error)}
    return row | {key: whole[key] for key in ("issue_seconds", "floor_seconds")} | {"families": by_family}


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
    ceilings = restored(results.contents.get("ceilings"))
    through = {row["case"] for row in results.contents["rows"] if "case" in row}
    for number, case in enumerate(cases):
        if number in through:
            continue
        if deadline is not None and time.monotonic() + 60 * case.minutes > deadline:
            rows = [identity(case, label) | {"not_measured": NO_TIME} for label in case.contenders]
        else:
            try:
                rows = run_case(case, device, ceilings, cold=cold, isolated=device.type == "cpu")
            except Exception as error:  # the other cases must not be lost
                rows = [identity(case, label) | {"failed": reason(error)} for label in case.contenders]
        results.extend([row | {"case": number} for row in rows])
        show(case, rows)
        if any(text in row.get("failed", "") for row in rows for text in FATAL):
            raise Poisoned(case.name)

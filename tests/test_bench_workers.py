"""Contenders in processes of their own: the same results, checked alike, and no process and no row is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import check, contenders, runner, workers
from bench.cases import Case
from bench.contenders import Contender
from bench.participants import Local, Lost
from bench.timing import Mark
from bench.workers import Task, Worker

CPU = torch.device("cpu")
SMALL = Case("layer basic", False, 2, ("reference eager", "ours eager"), 2)
TRAINED = replace(SMALL, training=True)


def spoiled(label: str, case: Case, base: nn.Module, x: Tensor) -> Contender:
    """As usual, but ours computes one percent too much."""
    contender = contenders.build(label, case, base, x)
    if label.startswith("ours"):
        contender.gather = lambda: {"output": 1.01 * contender.results["output"]}
    return contender


def raising(label: str, case: Case, base: nn.Module, x: Tensor) -> Contender:
    if label.startswith("ours"):
        raise torch.OutOfMemoryError("no memory\nsecond line")
    return contenders.build(label, case, base, x)


def dying(label: str, case: Case, base: nn.Module, x: Tensor) -> Contender:
    """Ours is killed in its second run, the first of those that are timed."""
    contender = contenders.build(label, case, base, x)
    run, seen = contender.run, []

    def once(mark: Mark) -> None:
        if seen:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        seen.append(run(mark))

    if label.startswith("ours"):
        contender.run = once
    return contender


def leaving(label: str, case: Case, base: nn.Module, x: Tensor) -> Contender:
    """Ours ends its process in the middle of the first run."""
    contender = contenders.build(label, case, base, x)
    if label.startswith("ours"):
        contender.run = lambda mark: os._exit(7)
    return contender


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """The ids of the processes that a test starts, by contender. None is left when the test ends."""
    found: dict[str, list[int]] = {}
    original = Worker.__init__

    def noted(self: Worker, task: Task) -> None:
        original(self, task)
        found.setdefault(task.label, []).append(self.process.pid)

    monkeypatch.setattr(Worker, "__init__", noted)
    yield found
    assert found and not any(alive(process) for processes in found.values() for process in processes)


@pytest.mark.parametrize("case", [SMALL, TRAINED], ids=["eval", "training"])
def test_rows_are_those_of_one_process(case: Case, started: dict[str, list[int]]) -> None:
    """All but the times: errors and bytes, too."""
    case = replace(case, rounds=3, processes=3)
    rows, here = (runner.run_case(case, CPU, None, isolated=isolated) for isolated in (True, False))
    assert [
        {k: v for k, v in row.items() if k not in ("seconds", "median", "lower", "upper", "error")} for row in rows
    ] == [{k: v for k, v in row.items() if k not in ("seconds", "median", "lower", "upper", "error")} for row in here]
    for row in rows:
        assert len(row["seconds"]) == 3 and row["lower"] <= row["median"] <= row["upper"] and row["error"] < 1e-5
    processes = [process for label in case.contenders for process in started[label]]
    assert len(set(processes)) == 2 * case.processes and os.getpid() not in processes


@pytest.mark.parametrize("case", [SMALL, TRAINED], ids=["eval", "training"])
def test_a_worker_finds_what_this_process_finds(case: Case, started: dict[str, list[int]]) -> None:
    """Weights and inputs come from the same seeds, and everything that is checked comes over."""
    task = Task("ours eager", case, threads=torch.get_num_threads())
    worker = Worker(task)
    try:
        facts, found = worker.first()
        seconds = worker.run()
    finally:
        worker.close()
    own_facts, own = task.begin().first()
    theirs, ours = check.joined(found), check.joined(own)
    assert facts == own_facts == {} and theirs.keys() == ours.keys()
    assert seconds.keys() == ({"forward", "backward", "step"} if case.training else {"eval"})
    for name, value in ours.items():
        assert value.abs().max() > 0 and check.relative_error(theirs[name], value) < 1e-6


@pytest.mark.parametrize(
    ("make", "rounds", "key", "said"),
    [
        (spoiled, 2, "wrong", "output is off by 1.0e-02 (allowed: 1.0e-03)"),
        (raising, 2, "failed", "OutOfMemoryError: no memory"),
        (leaving, 2, "failed", "its process ended with 7"),
        pytest.param(
            *(dying, 2, "failed", "its process was killed, as the system does when memory runs out"),
            marks=pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL"),
        ),
    ],
    ids=["wrong", "raises", "ends", "killed-while-timed"],
)
def test_what_goes_wrong_in_a_process_costs_nobody_else(
    make: contenders.Build, rounds: int, key: str, said: str, started: dict[str, list[int]]
) -> None:
    rows = runner.run_case(replace(SMALL, rounds=rounds), CPU, None, make, isolated=True)
    assert [row["contender"] for row in rows] == ["reference eager", "ours eager"]
    right, unfit = rows
    assert len(right["seconds"]) == rounds and unfit[key] == said and "seconds" not in unfit and "median" not in unfit
    assert len(started["ours eager"]) == 1  # and is not begun again


def test_a_compiled_contender_has_one_process(started: dict[str, list[int]]) -> None:
    """It compiles once, with cold caches, and lives through all rounds."""
    case = replace(SMALL, contenders=("ours eager", "ours compiled"), rounds=2)
    rows = {row["contender"]: row for row in runner.run_case(case, CPU, None, isolated=True)}
    assert rows["ours compiled"]["compile_seconds"] > 0 and rows["ours compiled"]["caches"] == "cold"
    assert [len(row["seconds"]) for row in rows.values()] == [2, 2]
    assert (len(started["ours eager"]), len(started["ours compiled"])) == (2, 1)


class Threads(Local):
    """Tells how many threads its process computes with, and how many the process has that it was forked from."""

    def run(self) -> dict[str, float]:
        found = {"own": float(torch.get_num_threads())}
        if sys.platform == "linux":
            status = Path(f"/proc/{os.getppid()}/status").read_text().splitlines()
            found["server"] = float(next(line for line in status if line.startswith("Threads:")).split()[1])
        return found


class Counting(Task):
    def begin(self) -> Local:
        local = super().begin()
        return Threads(local.contender, local.case, local.device)


def test_threads(started: dict[str, list[int]]) -> None:
    """A worker has as many as it was given. To fork from a process with threads would be unsafe."""
    worker = Worker(Counting("ours eager", SMALL, threads=3))
    try:
        assert worker.run() == {"own": 3} | ({"server": 1} if sys.platform == "linux" else {})
    finally:
        worker.close()


def test_heaps_begin_differently() -> None:
    sizes = [[len(block) for block in workers.shaken(seed)] for seed in (0, 0, 1)]
    assert sizes[0] == sizes[1] != sizes[2]


def test_a_worker_that_is_gone_does_not_hang(started: dict[str, list[int]]) -> None:
    worker = Worker(Task("ours eager", SMALL))
    worker.process.kill()
    with pytest.raises(Lost, match="its process"):
        worker.run()
    with pytest.raises(Lost, match="its process"):
        worker.memory()
    worker.close()
    worker.close()


def test_an_interrupted_case_ends_its_processes(started: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "interleave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_case(SMALL, CPU, None, isolated=True)
    assert all(not alive(process) for processes in started.values() for process in processes)


ORPHANED = """
import time
from bench.cases import Case
from bench.workers import Task, Worker
if __name__ == "__main__":
    worker = Worker(Task("ours eager", Case("layer basic", False, 1, ())))
    worker.run()
    print(worker.process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(ORPHANED)
    places = {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=os.environ | places, text=True)
    assert parent.stdout is not None
    process = int(parent.stdout.readline())
    assert alive(process)
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 20
    while alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(process)

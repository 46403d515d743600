"""What `make gpu` does when things go wrong: results are written whatever dies, hangs or runs out of time."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, processes, results, runner
from bench.__main__ import main
from bench.cases import MODELS, TABLES, Case

CPU = torch.device("cpu")
SMALL = Case("layer basic", False, 2, ("reference eager", "ours eager"), 2)
TRAINED = Case("layer basic", True, 2, ("reference eager", "ours eager"), 2)


def test_a_run_goes_on_where_it_ended_and_stops_in_time(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    row = {"subject": "a", "part": "eval", "batch": 8, "dtype": "float32", "contender": "ours eager", "case": 0}
    results.Results(path, {"provenance": {}, "rows": [row]})
    again = results.Results.reopen(path)
    shown: list[str] = []
    runner.run_cases(
        [SMALL, SMALL, TRAINED], CPU, again, lambda case, rows: shown.append(case.name), time.monotonic() - 1
    )
    rows = results.load(path)["rows"]
    assert [row["case"] for row in rows] == [0, 1, 1, 2, 2]
    assert all(row["not_measured"] == "no time left" for row in rows[1:]) and len(shown) == 2
    assert list(tmp_path.iterdir()) == [path]


CHILD = """
import json, sys, time
path = sys.argv[sys.argv.index("--output") + 1]
contents = json.load(open(path))
done = {row["case"] for row in contents["rows"]}
for case in (i for i in range(9) if i not in done):
    row = {"subject": "x", "part": "eval", "batch": 1, "dtype": "float32", "contender": "ours eager", "case": case}
    if case == 1:
        sys.exit(7)
    if case == 4:
        time.sleep(60)
    contents["rows"].append(row | ({"failed": "CUDA error: lost"} if case == 2 else {"median": 1.0}))
    json.dump(contents, open(path, "w"))
    if case == 2:
        sys.exit(3)
"""


def test_a_dying_or_hanging_gpu_process_loses_no_row(tmp_path: Path) -> None:
    """It dies in case 1, loses the GPU in case 2 and hangs in case 4."""
    path = tmp_path / "gpu.json"
    results.Results(path, {"provenance": {}})
    cases = [SMALL] * 6
    gpu.table(path, cases, time.monotonic() + 3, [sys.executable, "-c", CHILD])
    rows = results.load(path)["rows"]
    assert {row["case"] for row in rows} == set(range(6))
    reasons = {i: [row.get("failed") or row.get("not_measured") for row in rows if row["case"] == i] for i in range(6)}
    assert reasons[0] == [None] and reasons[3] == [None]
    assert reasons[1] == ["the process ended with 7"] * 2
    assert reasons[2] == ["CUDA error: lost"]
    assert reasons[4] == reasons[5] == ["no time left"] * 2


def test_a_lost_gpu_ends_the_process_with_its_rows_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> list[results.Row]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "run_case", broken)
    file = results.Results(tmp_path / "a.json", {"provenance": {}})
    with pytest.raises(runner.Poisoned, match="layer basic"):
        runner.run_cases([SMALL, SMALL], CPU, file, lambda case, rows: None)
    assert [row["case"] for row in results.load(tmp_path / "a.json")["rows"]] == [0, 0]


GRANDCHILD = "import fcntl, sys, time; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX); time.sleep(60)"
PARENT = f"""
import subprocess, sys, time
print("begun", flush=True)
subprocess.Popen([sys.executable, "-c", {GRANDCHILD!r}, sys.argv[1]])
time.sleep(float(sys.argv[2]))
print("ended", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
@pytest.mark.parametrize(("seconds", "status", "said"), [("1", 0, ["begun", "ended"]), ("60", None, ["begun"])])
def test_nothing_outlives_the_deadline(seconds: str, status: int | None, said: list[str], tmp_path: Path) -> None:
    """Neither the process nor what it has started, which holds its output open, and a lock while it lives."""
    import fcntl

    begun, lock = time.monotonic(), tmp_path / "lock"
    background = processes.spawn([sys.executable, "-c", PARENT, str(lock), seconds])
    assert background.end_by(begun + 3) == status
    assert background.lines() == said
    assert time.monotonic() - begun < 10
    time.sleep(0.2)  # the system may take a moment
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_is_compiled_ahead_is_in_the_table() -> None:
    peers = gpu.warmed("peers")
    assert {case.contenders[0] for case in peers} >= {"resnet50 compiled", "resnet152 compiled", "densenet169 compiled"}
    reference = gpu.warmed("reference")
    assert {case.contenders for case in reference} == {("reference compiled",)}
    assert reference[0].subject == "seqresnet_b22" and len(reference) == len(set(reference))
    assert {case.subject for name in MODELS for case in gpu.warmed(name)} == set(MODELS)
    assert all(case.dtype == "bfloat16" for case in peers + reference)


@pytest.mark.parametrize(
    ("code", "passed", "summary"),
    [
        ("print('5 passed')", True, "5 passed"),
        ("print('FAILED a.py::b'); print('1 failed'); raise SystemExit(1)", False, "1 failed"),
        ("import time; print('..', flush=True); time.sleep(60)", False, "stopped, no time left"),
    ],
    ids=["passed", "failed", "late"],
)
def test_outcome_of_tests(code: str, passed: bool, summary: str) -> None:
    process = processes.spawn([sys.executable, "-c", code])
    found = gpu.outcome("tests", process, time.monotonic() + 2)
    assert found == {"passed": passed, "summary": summary, "failures": ["FAILED a.py::b"] * ("FAILED" in code)}


def test_further_tests_exist() -> None:
    """A path that is none would end pytest before any test."""
    for path in (f"tests/test_{name}" for name in gpu.FURTHER):
        file, _, test = path.partition("::")
        assert f"def {test}" in (Path(__file__).parents[1] / file).read_text()


@pytest.mark.parametrize("missing", ["tests", "further_tests"])
def test_conclusion_needs_all_tests(missing: str, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    passed = {name: {"passed": True} for name in ("tests", "further_tests")}
    results.Results(output, {"provenance": {"gpu": "a GPU"}, **passed})
    assert gpu.conclude(output) == 0
    results.Results(output, {"provenance": {"gpu": "a GPU"}, **passed, missing: {"passed": False}})
    assert gpu.conclude(output) == 1


def test_failures_are_kept() -> None:
    assert gpu.failures(["..F", "FAILED tests/a.py::b - x", "ERROR tests/c.py", "1 failed"]) == [
        "FAILED tests/a.py::b - x",
        "ERROR tests/c.py",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    assert main(["gpu", "--output", str(output)]) == 2
    assert "--dry-run needs none" in capsys.readouterr().err and not output.exists()
    with pytest.raises(SystemExit, match="needs a GPU"):
        main(["run", "--cases", "gpu", "--output", str(output)])


def test_conclusion_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    results.Results(output, {"provenance": {"gpu": "a GPU"}})
    assert gpu.conclude(output) == 1  # no test has passed
    assert capsys.readouterr().out.count("not measured") == 14


def test_the_important_cases_come_first() -> None:
    first = [(case.subject, case.training, case.batch) for case in TABLES["gpu"]()[:3]]
    assert first == [("seqresnet_b42", False, 256), ("seqresnet_b42", True, 256), ("seqresnet_b42", False, 1)]

"""`python -m bench run`: which cases it takes, and when it goes on with a results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import ceilings, report, run, runner
from bench.__main__ import main
from seqconv_triton.tools.ceilings import Ceilings


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cases that would have been timed."""
    names: list[str] = []
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: Ceilings(1e9, 1e9))
    monkeypatch.setattr(run, "run_cases", lambda cases, *rest: names.extend(case.name for case in cases))
    return names


def start(output: Path, *more: str) -> int:
    return main(["run", "--cases", "quick", "--no-plots", "--output", str(output), *more])


def contents(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_only_takes_several_texts(ran: list[str], tmp_path: Path) -> None:
    assert start(tmp_path / "r.json", "--only", "layer basic", "width 4") == 0
    assert {name.split(",")[0] for name in ran} == {"layer basic", "width 4", "dense width 4"}


def test_only_with_a_name_that_nothing_has(ran: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no case of the table quick has 'vgg' in its name"):
        start(tmp_path / "r.json", "--only", "vgg")
    assert not ran and not (tmp_path / "r.json").exists()


def test_append_goes_on_with_the_same_cases_only(
    ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows know their case by its number among the chosen ones."""
    output = tmp_path / "r.json"
    assert start(output, "--only", "depth", "layer") == 0
    row = {"case": 0, "median": 1.0}
    output.write_text(json.dumps(contents(output) | {"rows": [row], "seconds": 1000.0}))
    assert start(output, "--only", "layer", "depth", "--append") == 0
    assert 1000 <= contents(output)["seconds"] < 2000, "of both runs together"
    before, count = output.read_text(), len(ran)
    assert start(output, "--only", "width", "--append") == 2
    assert "was begun with other cases" in capsys.readouterr().err
    assert output.read_text() == before and len(ran) == count
    output.write_text(json.dumps({name: value for name, value in contents(output).items() if name != "cases"}))
    assert start(output, "--only", "layer", "depth", "--append") == 2, "of an older program: who knows its cases?"


def test_append_takes_a_file_that_has_no_cases_yet(ran: list[str], tmp_path: Path) -> None:
    """With what else it holds, such as the outcome of `bench gpu`'s tests."""
    output = tmp_path / "r.json"
    output.write_text(json.dumps({"format": 2, "rows": [], "notes": [], "provenance": {}, "tests": {"passed": True}}))
    assert start(output, "--only", "depth", "--append") == 0
    assert ran and contents(output)["tests"] == {"passed": True}


def test_what_had_no_time_left_is_run_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, rows = tmp_path / "r.json", list[str]()
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: Ceilings(1e9, 1e9))
    assert start(output, "--only", "depth", "--minutes", "0.0001") == 0
    assert all(row["not_measured"] == "no time left" for row in contents(output)["rows"])
    monkeypatch.setattr(runner, "run_case", lambda case, *rest, **more: rows.append(case.name) or [{"median": 1.0}])
    monkeypatch.setattr(report, "show", lambda case, rows: None)
    assert start(output, "--only", "depth", "--append") == 0
    assert len(rows) == len(contents(output)["rows"]) == 4

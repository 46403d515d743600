"""`python -m bench show`: every line is measured, in the terminal, the picture and the file alike."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the demo's extra")

from bench import showcase
from bench.__main__ import main
from bench.cases import Case
from bench.results import Row
from bench.runner import run_case


def without_compiler(case: Case, *given: Any, **options: Any) -> list[Row]:
    """The rows of a case, eager ones in the place of compiled ones."""
    rows = run_case(replace(case, contenders=showcase.PLAIN, rounds=1), *given, **options)
    stand_in = {"contender": "ours compiled", "compile_seconds": 0.01, "caches": "cold"}
    asked = "ours compiled" in case.contenders
    return rows + [row | stand_in for row in rows if asked and row["contender"] == "ours eager"]


def test_the_same_figures_everywhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(showcase, "run_case", without_compiler)
    given = ["show", "--model", "cifar_seqresnet_b_r7_k16", "--image", "16", "--limit", "0", "--output", str(tmp_path)]
    assert main(given) == 0
    printed = capfd.readouterr().out
    lines = [showcase.Line(**line) for line in json.loads((tmp_path / "showcase.json").read_text())["lines"]]
    assert [line for line in lines if str(line) not in printed] == []
    (distance,) = re.findall(r"logits, relative distance to theirs +(\S+)", printed)
    assert 0 < float(distance) < 1e-5
    assert {line.unit for line in lines} == {"s", "bytes"} and all(line.ours > 0 for line in lines)
    assert [(line.name, line.theirs) for line in lines if line.given_up] == [("torch.compile, caches empty", 0.01)]
    kept = lines[-1]
    assert kept.ours < kept.theirs / 2, "a quarter of the bytes is what the library is for"
    assert (tmp_path / "showcase.png").read_bytes().startswith(b"\x89PNG")
    assert "group" in printed and "= window" in printed


def test_what_is_wrong_is_not_shown() -> None:
    with pytest.raises(RuntimeError, match=r"ours eager: output is off by 0\.7"):
        showcase.by_contender([{"contender": "ours eager", "part": "eval", "wrong": "output is off by 0.7"}], "eval")


def test_a_compilation_that_fails_is_no_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(*words: str) -> list[str]:
        return [sys.executable, "-c", "print('ready'); raise SystemExit('no compiler')"]

    monkeypatch.setattr(showcase, "python", command)
    with pytest.raises(RuntimeError, match="reference compiled: no compiler"):
        showcase.compilation("seqresnet_b22", 64, 30)


def test_seconds_and_bytes_for_the_eye() -> None:
    assert str(showcase.Line("step", 2.5, 0.25, "s", "10 ×")).split() == ["step", "2.5", "s", "250", "ms", "10", "×"]
    assert str(showcase.Line("compile", 20.0, 9.0, "s", "", True)).split() == ["compile", ">", "20.0", "s", "9.0", "s"]

"""Packages that are not installed: one line that names the extra to install, before anything is read or written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from runs import run_recipe

from recipes.commands import COMMANDS
from seqconv_triton.cli import main
from seqconv_triton.optional import require

# id: arguments, the package that is missing, what the line says
CASES = {
    "demo": (["demo"], "sklearn", "the demo needs sklearn: pip install seqconv-triton[demo]"),
    "train": (["train", "--data=digits"], "sklearn", "the digits needs sklearn: pip install seqconv-triton[train]"),
    "predict": (["predict", "best.pt", "a.png"], "PIL", "predict needs PIL: pip install seqconv-triton[train]"),
    "ablation": (["ablation"], "scipy", "the ablation needs scipy: pip install seqconv-triton[demo]"),
    "heatmap": (["heatmap", "a.pt"], "matplotlib.figure", "needs matplotlib.figure: pip install seqconv-triton[plot]"),
    "tune": (["tune"], "triton", "tune needs triton: pip install seqconv-triton[triton] (Linux)"),
    "kernels": (["kernels"], "triton", "kernels needs triton: pip install seqconv-triton[triton] (Linux)"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_extra_is_named(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, package, message = CASES[case]
    for other in ("matplotlib", "sklearn", "scipy", "tqdm"):
        if not package.startswith(other):
            pytest.importorskip(other, reason="an optional package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    run = run_recipe if arguments[0] in COMMANDS else main
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ImportError):
        run([*arguments, "--debug"])


def test_what_is_there_is_not_missed() -> None:
    require("this test", "dev", "torch", "pytest")

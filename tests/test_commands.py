"""`python -m recipes.X`, `python -m seqconv_triton X`: how they are called, and how they end."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from runs import run_recipe

from recipes.commands import COMMANDS
from seqconv_triton import cli


def test_recipes_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("recipes", run_name="__main__")
    out = capsys.readouterr().out
    assert all(f"python -m recipes.{name} " in out and text in out for name, text in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_recipe([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m recipes.{name} ")


@pytest.mark.parametrize("name", ["evaluate", "ablation"])
def test_module_is_a_program(name: str) -> None:
    """The exit status is the process's, the error one line that names the command."""
    arguments = {"evaluate": ["no.pt"], "ablation": ["--networks", "vgg"]}[name]
    done = subprocess.run(
        [sys.executable, "-m", f"recipes.{name}", *arguments],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"python -m recipes.{name}: ") and done.stderr.count("\n") == 1


def test_command_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "info", cli.Command("", "seqconv_triton.none"))
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "seqconv-triton: No module named 'seqconv_triton.none'\n"
    with pytest.raises(ImportError):
        cli.main(["info", "--debug"])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("k (0) must be at least 1"), 2, "program: k (0) must be at least 1\n"),
        (KeyboardInterrupt(), 130, "program: interrupted\n"),
    ],
    ids=["wrong-input", "Ctrl-C"],
)
def test_errors_become_a_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise error

    assert cli.exit_status("program", command, debug=False) == status
    assert capsys.readouterr().err == line


def test_errors_of_ours_are_not_hidden() -> None:
    """What no wrong input causes keeps its traceback."""

    def command() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.exit_status("program", command, debug=False)

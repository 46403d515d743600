"""Compiled kernels, executed on the emulated GPU of tests/emulator/: in processes where Triton compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

from emulator.build import NoCompiler, compiler
from emulator.rows import ROWS, finished
from emulator.work import alone_task

TESTS = Path(__file__).parent
ARCHITECTURES = "sm_80", "sm_90"
ITSELF = ("instructions", "sample_kernels", "faults", "reading")
RUNS = {
    "itself": [f"emulator/test_{name}.py" for name in ITSELF],
    "the table": ["emulator/test_cases.py", "-k", "table"],
    "mutations": ["emulator/test_mutations.py"],
}
for number, architecture in enumerate(ARCHITECTURES):
    # A third of them; a ninth where all were clean with these very kernels (`make emulate`).
    task = alone_task(architecture, seed=1)
    parts = 9 if any(finished(ROWS, {task.name: task})) else 3
    options = ["--emulate", architecture, "--share", f"{number}/{parts}", "test_kernels.py", "test_kernels_backward.py"]
    RUNS[f"kernels alone, {architecture}"] = ["-p", "emulator.alone", *options]
    RUNS[f"cases, {architecture}"] = ["emulator/test_cases.py", "-k", architecture]


@pytest.mark.parametrize("run", RUNS)
def test_emulated(run: str) -> None:
    """Without a C++ compiler it is skipped; on CI (CI=true) that is an error."""
    try:
        compiler()
    except NoCompiler as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))
    arguments = [str(TESTS / a) if a.endswith(".py") else a for a in RUNS[run]]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env=os.environ | {"PYTHONPATH": str(TESTS)}, cwd=TESTS.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("on_ci", ["true", ""])
def test_without_a_compiler(on_ci: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", on_ci)
    with pytest.raises(NoCompiler if on_ci else pytest.skip.Exception, match=r"needs a C\+\+ compiler"):
        test_emulated("the table")

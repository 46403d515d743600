"""Compiled kernels, executed on the emulated GPU of tests/emulator/: in processes where Triton compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

from emulator.build import NoCompiler, compiler
from emulator.configurations import written_kernels

TESTS = Path(__file__).parent
ARCHITECTURES = "sm_80", "sm_90"
ITSELF = ("instructions", "sample_kernels", "faults", "reading")
RUNS = {
    "itself": [f"emulator/test_{name}.py" for name in ITSELF],
    "the table": ["emulator/test_cases.py", "-k", "table"],
    "mutations": ["emulator/test_mutations.py"],
}
for architecture in ARCHITECTURES:
    RUNS[f"cases, {architecture}"] = ["emulator/test_cases.py", "-k", architecture]


@pytest.mark.parametrize("run", RUNS)
def test_emulated(run: str) -> None:
    execute(*RUNS[run])


@pytest.mark.parametrize("number", range(len(ARCHITECTURES)))
def test_every_kernel_alone(number: int, tmp_path: Path) -> None:
    """A third of the tests of single kernels, as one GPU or the other and in another order of programs."""
    options = ["--emulate", ARCHITECTURES[number], "--share", f"{number}/3", "--seed", f"{number + 1}"]
    record = tmp_path / "lines"
    execute("-p", "emulator.alone", *options, "--record", str(record), "test_kernels.py", "test_kernels_backward.py")
    met = {kernel for line in record.read_text("utf-8").splitlines() for kernel in json.loads(line)["kernels"]}
    assert met == written_kernels()


def execute(*arguments: str) -> None:
    """pytest in a process. Without a C++ compiler the test is skipped; on CI (CI=true) that is an error."""
    try:
        compiler()
    except NoCompiler as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))
    arguments = tuple(str(TESTS / a) if a.endswith(".py") else a for a in arguments)
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

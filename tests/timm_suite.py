"""`python tests/timm_suite.py`: timm's own tests of models, on every model of ours; their table goes into docs/timm.md.

Needs timm, torchvision and pytest, and pip, which fetches the source of the installed timm into a temporary folder.
Arguments go on to pytest (`-k fx`), and the page stays as it is. The exit status is 1 where a test fails that should
not, does not fail as it should, or has not run on every model.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from facilities import write

import seqconv_triton as sct

DOCUMENT = Path(__file__).parent.parent / "docs" / "timm.md"
START = "<!-- table: make timm -->"
FILE = "tests/test_models.py"
# Written for some models of timm's; they hold for any. What stands beside the model's name in their tables:
OTHERS: dict[str, object] = {"model_kwargs": {}, "stop_early_final": True}
FOR_ANY = (
    "test_head_hidden_size",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_prune_intermediate_layers_last_feature",
    "test_prune_intermediate_layers_params_used",
    "test_reset_classifier_keeps_pool",
)
IN_FLOAT64 = ("test_prune_intermediate_layers_contract",)  # compares two ways of computing, to a float32's last bits
REFUSED = ("test_model_forward_torchscript", "test_model_forward_fx_torchscript")  # docs/timm.md says why
REASON = "NotImplementedError: torch.jit.script cannot compile"


class OurModels:
    """Gives timm's tests our models, drops those that take none, and counts outcomes."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, set[str]] = defaultdict(set)

    def pytest_pycollect_makeitem(self, name: str, obj: Any) -> None:
        if name in FOR_ANY:
            obj.pytestmark = [substituted(mark) for mark in obj.pytestmark]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        ours = sct.list_models()
        items[:] = [item for item in items if parameters(item).get("model_name") in ours]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        exact = item.originalname in IN_FLOAT64
        torch.set_default_dtype(torch.float64 if exact else torch.float32)
        yield
        torch.set_default_dtype(torch.float32)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = (yield).get_result()
        if report.when == "call" or report.outcome != "passed":
            name = item.originalname
            self.outcomes[name][report.outcome] += 1
            crash = getattr(report.longrepr, "reprcrash", None)
            if crash is not None:
                kind, _, message = crash.message.partition("\n")[0].partition(": ")
                self.reasons[name].add(f"{kind}: {message}" if message else kind)

    def wrong(self, whole: bool) -> list[str]:
        """Tests that failed otherwise than they should, or, of a `whole` run, not once for every model."""
        found = [name for name in (*FOR_ANY, *REFUSED) if whole and name not in self.outcomes]
        for name, outcomes in self.outcomes.items():
            wanted = "failed" if name in REFUSED else "passed"
            reasons = all(reason.startswith(REASON) for reason in self.reasons[name])
            if set(outcomes) != {wanted} or not reasons or (whole and outcomes[wanted] != len(sct.list_models())):
                found.append(name)
        return found

    def table(self) -> str:
        lines = [
            f"| timm's test, on {len(sct.list_models())} models | passed | failed | skipped |",
            "| --- | --- | --- | --- |",
        ]
        for name in sorted(self.outcomes):
            n = self.outcomes[name]
            exact = ", in float64" if name in IN_FLOAT64 else ""
            lines.append(f"| `{name}`{exact} | {n['passed']} | {n['failed']} | {n['skipped']} |")
        total = sum(self.outcomes.values(), Counter())
        lines.append(f"| **all** | **{total['passed']}** | **{total['failed']}** | **{total['skipped']}** |")
        return "\n".join(lines)


def parameters(item: pytest.Item) -> dict[str, object]:
    return getattr(getattr(item, "callspec", None), "params", {})


def substituted(mark: pytest.Mark) -> pytest.Mark:
    """A table of models becomes one of ours; other marks stay."""
    names = mark.args[0] if mark.name == "parametrize" else ""
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    if names[0] != "model_name":
        return mark
    rows = [(model, *(OTHERS[name] for name in names[1:])) for model in sct.list_models()]
    return pytest.mark.parametrize(names, rows).mark


def fetch(folder: Path) -> Path:
    """The source of the installed timm, unpacked."""
    wanted = f"timm=={importlib.metadata.version('timm')}"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "timm",
        "--dest",
        str(folder),
    ]
    subprocess.run([*pip, wanted], check=True)
    (archive,) = folder.glob("timm-*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def main() -> int:
    importlib.import_module("seqconv_triton.interop.timm")  # timm's tests list the models when they are collected
    models = OurModels()
    with tempfile.TemporaryDirectory() as folder:
        source = fetch(Path(folder))
        quiet = [
            "-q",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            "-c",
            str(source / "pyproject.toml"),
            "--rootdir",
            str(source),
        ]
        status = pytest.main([str(source / FILE), *quiet, *sys.argv[1:]], plugins=[models])
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("timm", "torch", "torchvision"))
    when = f"Run on {datetime.date.today().isoformat()} with {versions}, Python {platform.python_version()}, a CPU."
    table = f"{models.table()}\n\n{when}"
    print(table)
    for name, reasons in sorted(models.reasons.items()):
        print(f"{name}: {'; '.join(sorted(reasons))}")
    if len(sys.argv) > 1:
        print(f"{DOCUMENT.name} is as it was: not all tests were asked for.")
    else:
        write(DOCUMENT, START, table)
    ran = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and len(models.outcomes) > 0
    for name in models.wrong(len(sys.argv) == 1):
        print(f"not as it should be: {name}")
        ran = False
    return int(not ran)


if __name__ == "__main__":
    sys.exit(main())

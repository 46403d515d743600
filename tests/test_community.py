"""What stands around the code: workflows call targets that the Makefile has, the citation agrees with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_make(path: Path) -> None:
    """One step each that does the work, so that whoever has a checkout can run the same."""
    yaml = pytest.importorskip("yaml", reason="the docs' extra brings it")
    workflow = yaml.safe_load(path.read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    (command,) = [step["run"] for step in job["steps"] if "run" in step]
    program, *words = command.split()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert program == "make" and {word for word in words if "=" not in word} <= set(targets)
    assert workflow["permissions"] == {"contents": "read"}


def test_ci_runs_what_contributors_are_told_to() -> None:
    command = "make lint docs test"
    for name in (".github/workflows/ci.yml", ".ci/run", "CONTRIBUTING.md", "README.md"):
        assert command in (ROOT / name).read_text("utf-8"), name


def test_citation() -> None:
    yaml = pytest.importorskip("yaml", reason="the docs' extra brings it")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Huang", "Ou", "Wu", "Feng"]
    assert paper["title"] in (ROOT / "README.md").read_text("utf-8") and paper["year"] == 2019
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_links_of_the_root_pages_exist() -> None:
    for page in ("CONTRIBUTING.md", "README.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text("utf-8")):
            assert (ROOT / target).exists(), f"{page}: {target}"

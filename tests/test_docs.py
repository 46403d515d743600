"""The documentation: the site builds without a warning, blocks and scripts run, pictures and tables are current."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import runpy
import shlex
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from runs import recipe_module, run_recipe

import seqconv_triton as sct
from bench import __main__ as benchmarks
from recipes import demo
from recipes.commands import COMMANDS as RECIPES
from recipes.training import checkpoint
from recipes.training.log import Log, Row
from seqconv_triton import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
PICTURES = sorted(path.stem for path in DOCS.glob("draw_*.py"))
EXAMPLES = {
    "compile_and_infer": "folded: largest difference",
    "feature_maps": "Grad-CAM: (2, 8, 8)",
    "seqconv_in_your_model": "94,762 parameters",
    "train_digits": "epoch 3: ",
}
# Python blocks behind <!-- not run: reason -->, by page. A new one has to be named here as well.
NOT_RUN = {"docs/facilities.md": ["not run: test_libraries.py runs it on a smaller network"]}
OPTIONAL = ("timm", "torchvision")  # pages about them are skipped where they cannot be imported

BLOCK = re.compile(
    r"(?:<!-- (?P<note>[^\n]*?) -->\n+)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(note of the comment in front, or "", text) of the page's fenced blocks in these languages."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(match["note"] or "", match["text"]) for match in found if match["language"] in languages]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]
# (page, [module, arguments …]) of every `-m seqconv_triton …` and `-m recipes.X …`
COMMANDS = [
    (name_of(page), words[words.index("-m") + 1 :])
    for page in PAGES
    for _, text in blocks(page, "", "bash", "sh", "shell", "console")
    for line in text.replace("\\\n", " ").splitlines()
    if re.search(r"-m (seqconv_triton|recipes\.)", line)
    for words in [shlex.split(line.removeprefix("$ "), comments=True)]
    if "…" not in words
]


def skip_without(package: str) -> None:
    """A torchvision beside another build of torch raises RuntimeError."""
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{package} cannot be imported here: {error}")


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for package in OPTIONAL:
        if any(re.search(rf"^(import|from) {package}\b", text, re.MULTILINE) for _, text in blocks(page, "python")):
            skip_without(package)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for note, text in blocks(page, "python"):
        if not note.startswith("not run"):
            exec(compile(text, name_of(page), "exec"), namespace)


def test_blocks_that_do_not_run_are_known() -> None:
    marked = {
        name_of(page): [note for note, _ in blocks(page, "python") if note.startswith("not run")] for page in PAGES
    }
    assert {page: notes for page, notes in marked.items() if notes} == NOT_RUN
    assert all(note.removeprefix("not run: ") for notes in marked.values() for note in notes)


def test_blocks_are_found() -> None:
    """The pages' own count of fences: a block that the expression above misses would never run."""
    fences = sum(len(re.findall(r"^ *```python", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES)
    assert fences == sum(len(blocks(page, "python")) for page in PAGES) > 8


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_commands_parse(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the point where the command would do its work."""
    end = next((i for i, word in enumerate(words) if word in {">", "|", "&&", ";"}), len(words))
    name = command_name(words)
    assert name in RECIPES or name in cli.COMMANDS, f"{page}: {words}"
    module = recipe_module(name) if name in RECIPES else importlib.import_module(cli.COMMANDS[name].module)
    called: list[str] = []
    monkeypatch.setattr(module, "run_from_arguments", lambda arguments: called.append(name) or 0)
    assert run(words[:end]) == 0
    assert called == [name]


BENCHMARKS = sorted(
    {
        found.strip()
        for page in [*PAGES, *(ROOT / "bench" / "results").glob("*.md")]
        for found in re.findall(r"python -m bench\b([^`\n#()]*)", page.read_text(encoding="utf-8"))
    }
)


@pytest.mark.parametrize("words", BENCHMARKS)
def test_benchmark_commands_parse(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the point where they would measure; in text as well as in blocks."""
    given = shlex.split(words.replace("…", "text"))
    name = given[0] if given and not given[0].startswith("-") else "run"
    called: list[str] = []
    module = importlib.import_module(benchmarks.COMMANDS[name][1])
    monkeypatch.setattr(module, "run_from_arguments", lambda arguments: called.append(name) or 0)
    assert benchmarks.main(given) == 0 and called == [name]


def command_name(words: list[str]) -> str:
    return words[1] if words[0] == "seqconv_triton" else words[0].removeprefix("recipes.")


def run(words: list[str]) -> int:
    """`python -m WORDS`, in this process."""
    return cli.main(words[1:]) if words[0] == "seqconv_triton" else run_recipe([command_name(words), *words[1:]])


RUN = [
    (page, words) for page, words in COMMANDS if command_name(words) in {"heatmap", "history"} or "--dry-run" in words
]


@pytest.mark.parametrize(("page", "words"), RUN, ids=[" ".join(words) for _, words in RUN])
def test_command_runs(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that take a second, as they stand in the page, where `demo` and two runs have left their files."""
    pytest.importorskip("triton" if command_name(words) == "tune" else "matplotlib", reason="an optional package")
    monkeypatch.chdir(tmp_path)
    weights = demo.networks(10)["SeqResNet"]().state_dict()
    checkpoint.save({"model": weights, "epochs": 1, "seed": 0}, Path("out/demo/seqresnet.pt"))
    for name in ("run-a", "run-b"):
        row = Row(1, 0.1, 2.0, 70.0, 1.5, 60.0, 1000.0, 1.0)
        Log(Path("out", name), [asdict(row), asdict(row) | {"epoch": 2}], tensorboard=False).write()
    assert run(words) == 0, page
    out, err = capsys.readouterr()
    assert out and not err
    assert len(list(tmp_path.rglob("*.png"))) == (command_name(words) != "tune")


def test_commands_that_run_are_found() -> None:
    assert {command_name(words) for _, words in RUN} == {"heatmap", "history", "tune"}


OUTPUTS = [
    (page, note.removeprefix("output: "), text)
    for page in PAGES
    for note, text in blocks(page, "text")
    if note.startswith("output: ")
]


@pytest.mark.parametrize(("page", "command", "text"), OUTPUTS, ids=[command for _, command, _ in OUTPUTS])
def test_output_is_what_the_command_prints(
    page: Path, command: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "seqconv_triton"]
    assert cli.main(words[3:]) == 0
    assert capsys.readouterr().out == text, f"{name_of(page)} shows an old output of: {command}"


def test_outputs_are_found() -> None:
    assert len(OUTPUTS) >= 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    if name == "train_digits":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed here")
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out and EXAMPLES[name] in out


def test_every_example_is_run_and_short() -> None:
    files = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "examples").glob("*.py")}
    assert set(files) == {*EXAMPLES, "export_checkpoint"}  # that one by test_train_commands.py
    assert max(files.values()) < 60


@pytest.mark.parametrize("script", PICTURES)
def test_picture_is_current(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn anew it has the same cells; bytes differ between versions of matplotlib."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed here")
    monkeypatch.syspath_prepend(DOCS)
    drawing = importlib.import_module("drawing")
    drawn = importlib.import_module(script).main(tmp_path)
    assert cells(drawn, drawing.PALETTE) == cells(DOCS / drawn.name, drawing.PALETTE)


def cells(picture: Path, palette: tuple[str, ...]) -> Counter[str]:
    """How many filled or outlined shapes of each colour of ours an SVG has."""
    ElementTree.parse(picture)
    return Counter(colour for colour in re.findall(r"#[0-9a-f]{6}", picture.read_text()) if colour in palette)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; whatever is wrong with links, anchors, navigation or docstrings is an error."""
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("the extra `docs` is not installed here")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    handler = Warnings()
    logging.getLogger("mkdocs").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        try:
            build(config)
        except BaseException as error:  # mkdocs aborts with an exception of click's
            raise AssertionError("\n".join(handler.texts) or str(error)) from error
        finally:
            config.plugins.on_shutdown()
            logging.getLogger("mkdocs").removeHandler(handler)
    assert not handler.texts, "\n".join(handler.texts)
    return folder


class Warnings(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_site_documents_every_public_name(site: Path) -> None:
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    missing = [name for name in sct.__all__ if not re.search(rf'id="seqconv_triton\.({name}\.)?{name}"', page)]
    assert not missing


def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pattern = re.compile(r"""(?:<(?:script|img|iframe)[^>]*?\ssrc|<link[^>]*?\shref)=["']?(?:https?:)?//[^"'\s>]+""")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 8
    assert not {found for page in pages for found in pattern.findall(page.read_text(encoding="utf-8"))}


def test_every_public_name_has_a_docstring() -> None:
    assert all(getattr(sct, name).__doc__ for name in sct.__all__)

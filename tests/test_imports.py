"""Imports point down the rooms of docs/contributing.md and never in a circle; files and functions stay short."""

from __future__ import annotations

import ast
import fnmatch
import functools
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("seqconv_triton", "recipes", "bench")


def rooms(page: str) -> list[list[str]]:
    """The list of rooms, top line first: path patterns below the repository's or the package's root."""
    section = re.search(r"^## Rooms\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    cells = re.findall(r"^\| (`.*?) \|", section[1], re.MULTILINE)
    return [re.findall(r"`([^`]+)`", cell) for cell in cells]


@functools.cache
def line_of_room(path: str) -> tuple[int, str]:
    """(line in the list, room) of a file: that of the longest pattern that its path begins with."""
    path = path.removeprefix("seqconv_triton/")
    lines = enumerate(rooms((ROOT / "docs" / "contributing.md").read_text("utf-8")))
    matching = [(len(room), i, room) for i, line in lines for room in line if fnmatch.fnmatch(path, f"{room}*")]
    assert matching, f"{path} is in no room of docs/contributing.md"
    _, i, room = max(matching)
    return i, room


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Our modules that a file names in imports, wherever they stand, and in strings that are a module's name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports name their package"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            names = names[1:] if all(name in modules for name in names[1:]) else names
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            names = [node.value]
        yield from (name for name in names if name in modules)


@functools.cache
def graph(root: Path, tops: tuple[str, ...]) -> tuple[dict[str, Path], dict[str, set[str]]]:
    modules = {module_name(path, root): path for top in tops for path in sorted(root.glob(f"{top}/**/*.py"))}
    return modules, {name: set(imports(path, modules)) - {name} for name, path in modules.items()}


def arrows() -> Iterator[tuple[str, str]]:
    _, edges = graph(ROOT, TOPS)
    return ((importer, imported) for importer in edges for imported in edges[importer])


def line_of(module: str) -> tuple[int, str]:
    return line_of_room(graph(ROOT, TOPS)[0][module].relative_to(ROOT).as_posix())


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in the order in which each imports the next; none if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_imports_point_down() -> None:
    wrong = set()
    for importer, imported in arrows():
        (line, room), (other_line, other_room) = line_of(importer), line_of(imported)
        if other_line < line or (other_line == line and room != other_room):
            wrong.add(f"{importer} → {imported}")
    assert not wrong


def test_no_circles() -> None:
    assert not circle(graph(ROOT, TOPS)[1])


def test_kernels_and_plans_import_nothing_of_ours() -> None:
    for room in ("kernels/", "plan*.py"):
        outside = {f"{a} → {b}" for a, b in arrows() if line_of(a)[1] == room and line_of(b)[1] != room}
        assert not outside


def test_every_room_exists() -> None:
    lines = rooms((ROOT / "docs" / "contributing.md").read_text("utf-8"))
    used = {line_of(module)[1] for module in graph(ROOT, TOPS)[0]}
    assert used == {room for line in lines for room in line}


def test_what_the_test_sees(tmp_path: Path) -> None:
    """Lazy imports, those for types only, dynamic ones, packages; and the circle that they close."""
    lines = {
        "top": "import house.lazy",
        "lazy": "def f():\n    from house import typed",
        "typed": "if TYPE_CHECKING:\n    from house.dynamic import Name",
        "dynamic": "import importlib\nimportlib.import_module('house.top')",
        "__init__": "",
        "alone": "from house import VERSION, top",
    }
    (tmp_path / "house").mkdir()
    for name, text in lines.items():
        (tmp_path / "house" / f"{name}.py").write_text(text)
    _, edges = graph(tmp_path, ("house",))
    assert edges.pop("house.alone") == {"house", "house.top"}
    assert sorted(set(circle(edges))) == ["house.dynamic", "house.lazy", "house.top", "house.typed"]
    del edges["house.typed"]
    assert not circle(edges)


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef))


FILES = sorted(graph(ROOT, TOPS)[0].values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    """At most 300 lines a file, 80 a function, 20 parameters but for kernels and operators' schemas."""
    assert len(path.read_text("utf-8").splitlines()) <= 300
    for function in functions(path):
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno < 80, function.name
        decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
        parameters = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        if not re.search(r"triton\.jit|custom_op|register_fake", decorators):
            assert len(parameters) <= 20, function.name

"""The wheel: the library and nothing beside it, and no requirement but torch and NumPy."""

from __future__ import annotations

import re
import subprocess
import sys
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    pytest.importorskip("hatchling", reason="the extra `dev` is not installed here")
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, cwd=ROOT)
    (file,) = folder.glob("*.whl")
    return ZipFile(file)


def test_wheel_holds_the_library_alone(wheel: ZipFile) -> None:
    """Every module of seqconv_triton/, its py.typed and data; no recipes, bench, tests."""
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in installed} == {"seqconv_triton"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "seqconv_triton").rglob("*.py")}
    assert modules == {name for name in installed if name.endswith(".py")}
    assert "seqconv_triton/py.typed" in installed


def metadata(wheel: ZipFile) -> Message:
    (file,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    return message_from_bytes(wheel.read(file))


def test_wheel_requires_torch_and_numpy_alone(wheel: ZipFile) -> None:
    plain = [line for line in metadata(wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in plain} == {"torch", "numpy"}


def test_extras_of_the_pages_and_errors_are_there(wheel: ZipFile) -> None:
    """`pip install .[x]` anywhere, `require(who, "x", …)`, and README's list."""
    readme = ROOT / "README.md"
    rooms = (ROOT / room for room in ("seqconv_triton", "recipes", "bench", "examples"))
    paths = [readme, *(ROOT / "docs").rglob("*.md"), *(path for room in rooms for path in room.rglob("*.py"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    (listed,) = re.findall(r"extras (`triton`.*?)\.", readme.read_text(encoding="utf-8"), re.DOTALL)
    named = {*re.findall(r"(?:seqconv-triton|'\.)\[(\w+)\]", text), *re.findall(r'require\([^,]+, "(\w+)"', text)}
    named |= set(re.findall(r"`(\w+)`", listed))
    assert {"train", "plot", "demo", "onnx", "triton", "timm"} <= named
    assert named <= set(metadata(wheel).get_all("Provides-Extra", []))


def test_wheel_imports_without_its_checkout(wheel: ZipFile, tmp_path: Path) -> None:
    """A network built, fused and run, and the commands listed, with no recipes in reach."""
    wheel.extractall(tmp_path)
    script = """
import sys
sys.path = [sys.argv[1], *(path for path in sys.path if path not in ("", sys.argv[2]))]
import torch, seqconv_triton as sct
assert sct.__file__.startswith(sys.argv[1]), sct.__file__
model = sct.fuse(sct.create_model("cifar_seqresnet_b_r7_k16").eval())
assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
from seqconv_triton.cli import main
assert main(["info", "seqresnet_b22"]) == 0
assert not any(name.split(".")[0] in ("recipes", "bench") for name in sys.modules)
"""
    arguments = [sys.executable, "-c", script, str(tmp_path), str(ROOT)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

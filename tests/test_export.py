"""torch.export and AOTInductor: what leaves Python must run where nothing of the model was built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import error, randomise, small_imagenet
from torch import Tensor, nn

import seqconv_triton as sct

facility = pytest.mark.facility
DYNAMIC = {"x": {0: torch.export.Dim.DYNAMIC}}

LOAD = """
import sys, torch
kind, program, data, needs_ops = sys.argv[1:]
if needs_ops == "True":
    import seqconv_triton
if kind == "export":
    model = torch.export.load(program).module()
else:
    model = torch._inductor.aoti_load_package(program)
inputs, outputs = torch.load(data)
with torch.no_grad():
    for x, expected in zip(inputs, outputs):
        distance = ((model(x).double() - expected).norm() / expected.norm()).item()
        assert distance < 1e-5, distance
assert ("seqconv_triton" in sys.modules) == (needs_ops == "True")
assert "seqconv_triton.models.cifar" not in sys.modules or needs_ops == "True"
"""


def small() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A folded evaluation model, inputs of several batch sizes, and the float64 outputs."""
    model = randomise(sct.CifarSeqResNet(16, 1, bottleneck=True)).eval()
    inputs = [torch.randn(n, 3, 8, 8) for n in (2, 1, 5)]
    with torch.no_grad():
        outputs = [model.double()(x.double()) for x in inputs]
    return sct.fuse(model.float()), inputs, outputs


def run_elsewhere(tmp_path: Path, kind: str, program: Path, inputs: object, outputs: object, needs_ops: bool) -> None:
    data = tmp_path / "data.pt"
    torch.save((inputs, outputs), data)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, kind, str(program), str(data), str(needs_ops)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@facility("torch.export, dynamic batch, loaded where the model was never built")
def test_exported_program_is_plain_pytorch(tmp_path: Path) -> None:
    model, inputs, outputs = small()
    program = torch.export.export(model, (inputs[0],), dynamic_shapes=DYNAMIC)
    assert not any("seqconv" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "model.pt2")
    run_elsewhere(tmp_path, "export", tmp_path / "model.pt2", inputs, outputs, needs_ops=False)


class Layers(nn.Sequential):
    """With windows that end inside of a group."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


STRICT = {
    "imagenet": small_imagenet,
    "cifar": lambda: sct.CifarSeqResNet(16, 1),
    "cifar-dense": lambda: sct.CifarSeqResNet(16, 1, bottleneck=True, windowed=False),
    "layers": lambda: Layers(sct.SeqConv2d(3, 12, 4, bottleneck=True), sct.SeqConv2d(12, 20, 5)),
}


@facility("torch.export(strict=True), too: folded or not, evaluation")
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "plain"])
@pytest.mark.parametrize("case", STRICT)
def test_strictly_exported(case: str, folded: bool) -> None:
    """Dynamo traces every line of ours then, on every Python; a new plan, that nobody has looked at."""
    torch._dynamo.reset()
    model = randomise(STRICT[case](), layer_b=0.3).eval()
    model = sct.fuse(model) if folded else model
    x = torch.randn(2, 3, 40, 40)
    programs = [torch.export.export(model, (x,), dynamic_shapes=DYNAMIC, strict=strict) for strict in (True, False)]
    other = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        for program in programs:
            assert not any("seqconv" in str(node.target) for node in program.graph.nodes)
            assert error(program.module()(other), model(other)) < 1e-5


@facility("torch.export with the fused ops kept (use_backend), loaded with the package imported")
def test_exported_program_with_our_ops(tmp_path: Path) -> None:
    model, inputs, outputs = small()
    with sct.use_backend("aten"):
        program = torch.export.export(model, (inputs[0],), dynamic_shapes=DYNAMIC)
    assert sum("stage_forward" in str(node.target) for node in program.graph.nodes) == 3
    torch.export.save(program, tmp_path / "model.pt2")
    run_elsewhere(tmp_path, "export", tmp_path / "model.pt2", inputs, outputs, needs_ops=True)


@facility("AOTInductor, dynamic batch, loaded where the model was never built")
@pytest.mark.parametrize("fused_ops", [False, True], ids=["plain", "fused-ops"])
def test_aot_inductor(tmp_path: Path, fused_ops: bool) -> None:
    model, inputs, outputs = small()
    with sct.use_backend("aten" if fused_ops else None), torch.no_grad():
        program = torch.export.export(model, (inputs[0],), dynamic_shapes=DYNAMIC)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run_elsewhere(tmp_path, "aoti", Path(package), inputs, outputs, needs_ops=fused_ops)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_traced_by_torchscript(grad: bool) -> None:
    """Deprecated, and yet in use: a trace holds PyTorch's own operators, and takes other sizes."""
    model = randomise(sct.CifarSeqResNet(16, 1, bottleneck=True)).eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, torch.randn(2, 3, 8, 8))
    assert "seqconv_triton::" not in str(traced.inlined_graph)
    x = torch.randn(3, 3, 9, 7)
    assert error(traced(x), model(x)) < 1e-6

"""ONNX as PyTorch's documentation shows it: exported to a file, loaded from the file by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import error, randomise, small_imagenet
from torch import nn

import seqconv_triton as sct

facility = pytest.mark.facility
# Models, and whether they are fused.
FEW = (("seqresnet_b22", False), ("cifar_seqresnet_r4_k16", True), ("cifar_seqresnet_dense_r3_k8_n121", True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`--every-model` (make facilities): all of them, which takes minutes."""
    if "folded" in metafunc.fixturenames:
        every = [(name, folded) for name in sct.list_models() for folded in (False, True)]
        chosen = every if metafunc.config.getoption("every_model") else FEW
        ids = [f"{name}-{'fused' if folded else 'plain'}" for name, folded in chosen]
        metafunc.parametrize(("name", "folded"), chosen, ids=ids)


def export(model: nn.Module, x: torch.Tensor, path: Path, **options: object) -> None:
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, **options)


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime", reason="the onnx extra")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(logits)


@facility(
    "ONNX, every model, plain and fused: torch.onnx.export(model, (x,), file, dynamo=True) and InferenceSession(file)"
)
def test_files_load(tmp_path: Path, name: str, folded: bool) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx extra")
    pytest.importorskip("onnxscript", reason="the onnx extra")
    model = randomise(sct.create_model(name, num_classes=7), layer_b=0.1).eval()
    model, x = sct.fuse(model, plain=True) if folded else model, torch.randn(1, 3, 32, 32)
    export(model, x, tmp_path / "model.onnx")
    with torch.no_grad():
        assert error(run(tmp_path / "model.onnx", x), model(x)) < 1e-5
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert not any(node.op_type == "Split" for node in graph.node)
    if folded:
        constants = {constant.name for constant in graph.initializer}
        convs = [node for node in graph.node if node.op_type == "Conv"]
        assert convs and all(name in constants for conv in convs for name in conv.input[1:] if name)


ONNX = {
    "imagenet-fused": lambda: sct.fuse(randomise(small_imagenet(), layer_b=0.1)),
    "cifar-with-statistics": lambda: randomise(sct.CifarSeqResNet(16, 1, bottleneck=True)).eval(),
}


@facility("ONNX, dynamic batch and image size, run by ONNX Runtime")
@pytest.mark.parametrize("case", ONNX)
def test_dynamic_sizes(tmp_path: Path, case: str) -> None:
    """Logits within 1e-4; no operator of ours is left in the graph."""
    onnx = pytest.importorskip("onnx", reason="the onnx extra")
    pytest.importorskip("onnxscript", reason="the onnx extra")
    model = ONNX[case]()
    dims = {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}}
    export(model, torch.randn(2, 3, 64, 48), tmp_path / "model.onnx", dynamic_shapes=dims)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert {node.domain for node in nodes} == {""} and {"Conv", "Concat", "Relu"} <= {node.op_type for node in nodes}
    for shape in ((2, 3, 64, 48), (1, 3, 40, 40), (5, 3, 37, 81)):
        x = torch.randn(shape)
        logits = run(tmp_path / "model.onnx", x)
        with torch.no_grad():
            expected = model(x)
        assert expected.shape == logits.shape
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()

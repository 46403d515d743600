"""torch.compile: one graph, every mode, dynamic shapes without recompiling, no copies of a feature buffer."""

from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo.testing
from helpers import error, everything, randomise
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import seqconv_triton as sct
from seqconv_triton.layers import PackedSeqConv
from seqconv_triton.plan import Plan, Tail

facility = pytest.mark.facility
FAMILIES = {
    "cifar": lambda: sct.CifarSeqResNet(8, 1, dropout=0.0),
    "cifar-bottleneck": lambda: sct.CifarSeqResNet(8, 1, bottleneck=True, dropout=0.0),
    "cifar-dense": lambda: sct.CifarSeqResNet(8, 1, windowed=False, dropout=0.0),
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return everything(module, x, lambda m, t: [m(t)])


@facility("torch.compile(fullgraph=True) equals eager: outputs, gradients, statistics moved once a step")
@pytest.mark.parametrize("place", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_equals_eager(place: torch.device, family: str, training: bool) -> None:
    model = randomise(FAMILIES[family](), layer_b=0.1).train(training).to(place)
    x = torch.randn(2, 3, 8, 8, device=place)
    eager = step(model, x)
    compiled = everything(model, x, lambda m, t: [torch.compile(m, fullgraph=True)(t)])
    for name, value in eager.items():
        assert error(compiled[name], value) < 1e-4, name
    counters = [value for name, value in compiled.items() if name.endswith("num_batches_tracked")]
    assert all(value == training for value in counters)


@facility("torch.compile(fullgraph=True) equals eager: outputs, gradients, statistics moved once a step")
@pytest.mark.parametrize("place", ["interpreter"], indirect=True)
def test_a_stage_is_one_graph_in_the_interpreter(place: torch.device) -> None:
    stage = randomise(sct.Stage(Plan.stage(8, 8, 1, extension=8, tail=Tail(16, 3, 2, 2))))
    x = torch.randn(2, 8, 3, 4)
    eager = step(stage, x)
    compiled = everything(stage, x, lambda m, t: [torch.compile(m, fullgraph=True, backend="aot_eager")(t)])
    for name, value in eager.items():
        assert error(compiled[name], value) < 1e-4, name


@facility("torch.compile(fullgraph=True): every ImageNet model, forward and backward")
@pytest.mark.parametrize("name", sct.list_models("seqresne*"))
def test_whole_networks_are_one_graph(name: str) -> None:
    model = sct.create_model(name)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(torch.randn(2, 3, 32, 32)).sum().backward()
    assert counter.frame_count == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@facility("torch.compile modes: reduce-overhead (CUDA graphs on a GPU), max-autotune")
@pytest.mark.parametrize("place", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(place: torch.device, mode: str) -> None:
    torch.use_deterministic_algorithms(False)  # CUDA graphs cannot be captured while memory is filled with NaN
    model = randomise(FAMILIES["cifar-bottleneck"](), layer_b=0.1).to(place)
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for training in (False, True):
        model.train(training)
        for _ in range(3):
            x = torch.randn(4, 3, 8, 8, device=place)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            expected = step(model, x)
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(x)
            assert error(out, expected["output 0"]) < 1e-4
            for name, value in model.named_buffers():
                assert error(value, expected[name]) < 1e-4, name
            model.load_state_dict(before)


def frames(dynamic: bool | None, shapes: list[tuple[int, int]], training: bool) -> int:
    """How many of these (batch, size), one after the other, compile; each is checked against eager mode."""
    model = randomise(FAMILIES["cifar-bottleneck"](), layer_b=0.1).train(training)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    compiling = 0
    for batch, size in shapes:
        x = torch.randn(batch, 3, size, size)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        expected = model(x)
        model.load_state_dict(state)
        before = counter.frame_count
        got = compiled(x)
        compiling += counter.frame_count > before
        if training:
            got.sum().backward()
        assert error(got, expected) < 1e-5
    return compiling


SHAPES = [(2, 8), (8, 8), (17, 8), (8, 16), (17, 11), (2, 11), (16, 16), (2, 16), (17, 16)]


@facility("Dynamic batch and image size: batch 1, 2, 8, 17 at three sizes without compiling again")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dynamic_shapes_compile_once(training: bool) -> None:
    assert frames(True, SHAPES, training) == 1


@facility("Dynamic batch and image size: batch 1, 2, 8, 17 at three sizes without compiling again")
def test_batch_of_one_is_one_more() -> None:
    """torch.compile treats a size of 1 as a constant: that one batch size has a graph of its own."""
    assert frames(True, [(1, 8), (2, 8), (8, 11), (1, 16), (17, 16), (1, 11)], False) == 2


@facility("Dynamic batch and image size: batch 1, 2, 8, 17 at three sizes without compiling again")
def test_shapes_found_out_on_the_way() -> None:
    """Without dynamic=True: the first shape, then a dynamic batch, then dynamic sizes, and no more."""
    assert frames(None, SHAPES, False) <= 3


@facility("eval ↔ train: one compilation each, however often the mode changes")
def test_modes_of_the_module_compile_once_each() -> None:
    model = FAMILIES["cifar-bottleneck"]()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiling = []
    for training in (True, False) * 3:
        before = counter.frame_count
        compiled.train(training)
        compiled(torch.randn(2, 3, 8, 8))
        compiling.append(counter.frame_count > before)
    assert compiling == [True, True] + [False] * 4


@facility("No copy of a feature buffer in the generated code")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_generated_code_copies_no_buffer(training: bool) -> None:
    """Only our ops allocate tensors as wide as a buffer, and what they return goes on as it is."""
    model = sct.CifarSeqResNet(8, 2, bottleneck=True, dropout=0.0).train(training)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)

    def run(x: Tensor) -> Tensor:
        out = torch.compile(model, fullgraph=True)(x)
        if training:
            out.sum().backward()
        return out

    _, code = run_and_get_code(run, x)
    text = "\n".join(code)
    assert text.count("seqconv_triton.stage_forward") >= 3
    widths = {stage.plan.total_channels for stage in model.stages}
    allocated = re.findall(r"empty_strided(?:_cpu|_cuda)?\(\(([\d, ]+)\)", text)
    assert allocated
    for shape in allocated:
        sizes = [int(size) for size in shape.replace(",", " ").split()]
        assert len(sizes) < 4 or sizes[1] not in widths, shape
    # What a stage hands on is read by the next op itself, not by a kernel that would copy it.
    outputs = re.findall(r"(buf\d+) = (buf\d+)\[0\]", text)
    copied = re.findall(r"cpp_fused_(?:clone|_to_copy|copy)\w*stage\w*\(", text)
    assert outputs and not copied


@facility("Graph size: bounded, and the same for B22 and B42")
def test_graph_nodes_are_bounded() -> None:
    """B42 has 200 groups in its stages; its graph has one node a stage and those around."""
    nodes = {}
    for name in ("seqresnet_b22", "seqresnet_b42"):
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, inputs: object, kept: list[torch.fx.GraphModule] = graphs) -> object:
            kept.append(graph)
            return graph.forward

        model = sct.create_model(name).eval()
        with torch.no_grad():
            torch.compile(model, backend=keep, fullgraph=True)(torch.randn(1, 3, 32, 32))
        calls = [node for node in graphs[0].graph.nodes if node.op.startswith("call")]
        assert sum("stage_forward" in str(node.target) for node in calls) == 5
        nodes[name] = len(calls)
    assert nodes["seqresnet_b22"] == nodes["seqresnet_b42"] < 100
    assert sum(isinstance(m, PackedSeqConv) for m in model.modules()) == 5

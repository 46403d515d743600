"""torch.compile: one graph, every mode, dynamic shapes without recompiling, no copies of a feature buffer."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from helpers import error, everything, randomise, small_imagenet
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import seqconv_triton as sct
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.plan import Plan, Tail

facility = pytest.mark.facility
FAMILIES = {
    "cifar": lambda: sct.CifarSeqResNet(16, 1, dropout=0.0),
    "cifar-bottleneck": lambda: sct.CifarSeqResNet(16, 1, bottleneck=True, dropout=0.0),
    "cifar-dense": lambda: sct.CifarSeqResNet(16, 1, windowed=False, dropout=0.0),
    "imagenet": small_imagenet,
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return everything(module, x, lambda m, t: [m(t)])


@pytest.mark.parametrize("windowed", [True, False], ids=["windowed", "dense"])
def test_dropout_compiles_without_an_eager_run(windowed: bool) -> None:
    """A plan that nothing has walked yet; the masks drawn inside the graph are those of the same seed outside."""
    x = torch.randn(2, 3, 8, 8)
    model = randomise(sct.CifarSeqResNet(7, 7, windowed=windowed, dropout=0.3)).train()
    torch.manual_seed(3)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(x)
    torch.manual_seed(3)
    assert error(compiled, model(x)) < 1e-4


@facility("torch.compile(fullgraph=True) equals eager: outputs, gradients, statistics moved once a step")
@pytest.mark.parametrize("place", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_equals_eager(place: torch.device, family: str, training: bool) -> None:
    model = randomise(FAMILIES[family](), layer_b=0.1).train(training).to(place)
    x = torch.randn(2, 3, *(2 * [40 if family == "imagenet" else 8]), device=place)
    eager = step(model, x)
    # What Inductor compiles lies around the stages: alike in all CIFAR networks.
    backend = "inductor" if family in ("cifar-bottleneck", "imagenet") else "aot_eager"
    compiled = everything(model, x, lambda m, t: [torch.compile(m, fullgraph=True, backend=backend)(t)])
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
    x = torch.randn(2, 3, 32, 32)
    compiled(x).sum().backward()
    assert counter.frame_count == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert error(compiled(x), model(x)) < 1e-5
    assert counter.frame_count == 2


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step of the model itself, not of a copy."""
    x = x.clone().requires_grad_()
    out = run(x)
    wave = torch.sin(torch.arange(out.numel(), device=x.device)).view(out.shape).to(out.dtype)
    named = dict(model.named_parameters())
    found = zip(["x", *named], torch.autograd.grad(out, [x, *named.values()], wave), strict=True)
    results = {"output": out} | dict(found) | dict(model.named_buffers())
    return {name: value.detach().clone() for name, value in results.items()}


@facility("torch.compile modes: reduce-overhead (CUDA graphs on a GPU), max-autotune")
@pytest.mark.parametrize("place", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(place: torch.device, mode: str) -> None:
    torch.use_deterministic_algorithms(False)  # CUDA graphs cannot be captured while memory is filled with NaN
    model = randomise(FAMILIES["cifar-bottleneck"](), layer_b=0.1).to(place)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for training in (False, True):
        for module in (model, twin):
            module.train(training)
        for _ in range(3):
            x = torch.randn(4, 3, 8, 8, device=place)
            torch.compiler.cudagraph_mark_step_begin()
            got, expected = gradients(model, compiled, x), gradients(twin, twin, x)
            for name, value in expected.items():
                assert error(got[name], value) < 1e-4, name


@facility("torch.compile under autocast: bfloat16, one graph, forward and backward")
@pytest.mark.parametrize("place", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_compiled_under_autocast(place: torch.device) -> None:
    model = randomise(FAMILIES["cifar-bottleneck"](), layer_b=0.1).to(place)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8, device=place)
    with torch.autocast(place.type, torch.bfloat16):
        got = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
        expected = gradients(twin, twin, x)
    assert got["output"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert error(got[name], value) < 1e-2 and got[name].dtype == value.dtype, name


def test_users_own_network_is_one_graph() -> None:
    """SeqConv2d between layers of PyTorch; copied, pickled and loaded into after it was compiled."""
    layers = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), sct.SeqConv2d(12, 16, 4), nn.MaxPool2d(2)]
    layers += [sct.SeqConv2d(16, 8, 4, bottleneck=True), nn.Flatten(), nn.Linear(32, 3)]
    model = randomise(nn.Sequential(*layers))
    expected = step(model, torch.ones(2, 3, 6, 6))
    model.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    got = step(model, torch.ones(2, 3, 6, 6))
    for name, value in expected.items():
        assert error(got[name], value) < 1e-5, name
    model.eval()(x)
    other = randomise(nn.Sequential(*copy.deepcopy(layers)), seed=1).eval()
    model.load_state_dict(other.state_dict())
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert error(twin(x), other(x)) < 1e-6


def frames(
    dynamic: bool | None,
    shapes: list[tuple[int, int]],
    training: bool,
    family: str = "cifar-bottleneck",
    backend: str = "aot_eager",
) -> int:
    """How many of these (batch, size), one after the other, compile; each is checked against eager mode."""
    model = randomise(FAMILIES[family](), layer_b=0.1).train(training)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
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
        # Inductor's BN sums in another order, and training amplifies rounding.
        assert error(got, expected) < (1e-4 if backend == "inductor" else 1e-5)
    return compiling


SHAPES = [*((batch, size) for size in (8, 16, 11) for batch in (2, 8, 17)), (16, 16), (2, 8)]


@facility("Dynamic batch and image size: batch 1, 2, 8, 17 at three sizes without compiling again")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dynamic_shapes_compile_once(training: bool) -> None:
    assert frames(True, SHAPES, training) == 1


@facility("Dynamic batch and image size: batch 1, 2, 8, 17 at three sizes without compiling again")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_of_one_is_one_more(training: bool) -> None:
    """torch.compile treats a size of 1 as a constant: that one batch size has a graph of its own."""
    assert frames(True, [(1, 8), (2, 8), (8, 11), (1, 16), (17, 16), (1, 11)], training) == 2


@facility("Dynamic batch and image size: batch 1, 2, 8, 17 at three sizes without compiling again")
def test_generated_code_asks_for_no_shape() -> None:
    """Inductor may add guards of its own, and an ImageNet stem has BN and strides; 96 and up, as docs/ says."""
    shapes = [(2, 96), (17, 96), (8, 128), (2, 112), (17, 128)]
    assert frames(True, shapes, True, "imagenet", "inductor") == 1


@facility("Dynamic batch and image size: batch 1, 2, 8, 17 at three sizes without compiling again")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_shapes_found_out_on_the_way(training: bool) -> None:
    """Without dynamic=True: the first shape, then a dynamic batch, then dynamic sizes, and no more."""
    assert frames(None, SHAPES, training) <= 3


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


def uses_of_buffers(code: str) -> list[str]:
    """The lines of one generated module in which anything but our ops reads or writes a stage's feature buffer."""
    made = set(re.findall(r"(\w+) = torch\.ops\.seqconv_triton\.stage_forward", code))
    buffers = {name for name, call in re.findall(r"(\w+) = (\w+)\[1\]", code) if call in made}
    buffers |= set(re.findall(r"stage_backward\.default\([^,]+, [^,]+, (\w+),", code))
    assert buffers
    kernels = (line for line in code.splitlines() if re.search(r"\w*(fused|extern_kernels|copy|clone)\w*[.(]", line))
    return [line for line in kernels if "seqconv_triton" not in line and buffers & set(re.findall(r"\w+", line))]


@facility("No copy of a feature buffer in the generated code")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_generated_code_copies_no_buffer(training: bool) -> None:
    """No kernel reads a buffer, none allocates a tensor as large, and what a stage gives goes on as it is."""
    model = sct.CifarSeqResNet(8, 2, bottleneck=True, dropout=0.0).train(training)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    sizes = {2 * stage.plan.total_channels * 64 // 4**i for i, stage in enumerate(model.stages)}

    def run(x: Tensor) -> Tensor:
        out = torch.compile(model, fullgraph=True)(x)
        out.sum().backward()
        return out

    _, modules = run_and_get_code(run, x)
    assert len(modules) == 2
    for code in modules:
        assert not uses_of_buffers(code)
        allocated = re.findall(r"empty_strided(?:_cpu|_cuda)\(\(([\d, ]+)\)", code)
        assert allocated
        for shape in allocated:
            assert math.prod(int(size) for size in shape.replace(",", " ").split()) not in sizes, shape
        steps = re.findall(r"(\w+) = torch\.ops\.seqconv_triton\.stage_\w+\.default\((\w+),", code)
        first_outputs = dict(re.findall(r"(\w+) = (\w+)\[0\]", code))
        assert len(steps) == 3
        for (earlier, _), (_, given) in itertools.pairwise(steps):
            assert first_outputs[given] == earlier


def test_a_copied_buffer_would_be_seen() -> None:
    stage = sct.Stage(Plan.stage(8, 8, 1, tail=Tail(8, 1)))
    doubled = torch.compile(lambda x: stage.run(x, keep_buffer=True).buffer * 2, fullgraph=True)
    _, (code, *_) = run_and_get_code(doubled, torch.randn(2, 8, 4, 4))
    assert uses_of_buffers(code)


@facility("Graph size: bounded, and the same for B22 and B42")
@pytest.mark.parametrize(("training", "most"), [(True, 160), (False, 100)], ids=["train", "eval"])
def test_graph_nodes_are_bounded(training: bool, most: int) -> None:
    """B42 has 200 groups in its stages; its graph has one node a stage and those around."""
    nodes = {}
    for name in ("seqresnet_b22", "seqresnet_b42"):
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, inputs: object, kept: list[torch.fx.GraphModule] = graphs) -> object:
            kept.append(graph)
            return graph.forward

        model = sct.create_model(name).train(training)
        with torch.set_grad_enabled(training):
            torch.compile(model, backend=keep, fullgraph=True)(torch.randn(2, 3, 32, 32))
        calls = [node for node in graphs[0].graph.nodes if node.op.startswith("call")]
        assert sum("stage_forward" in str(node.target) for node in calls) == 5
        nodes[name] = len(calls)
    assert nodes["seqresnet_b22"] == nodes["seqresnet_b42"] < most
    assert sum(isinstance(m, PackedSeqConv) for m in model.modules()) == 5

"""What only a GPU can show; `make gpu` runs this first. Everything here is skipped without one."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import error, everything, randomise
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.plan import Plan, Tail

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]

facility = pytest.mark.facility

STAGES = {
    "b42-stage-1": Plan.stage(128, 32, 1, extension=128, tail=Tail(256, 3, 2, 4)),
    "b42-stage-3": Plan.stage(512, 64, 1, extension=512, tail=Tail(1024, 3, 2, 8)),
    "next-stage-1": Plan.stage(256, 32, 1, subgroups=8, extension=256, tail=Tail(512, 3, 2, 64)),
    "cifar-entry": Plan.stage(64, 8, 1, entry_channels=16, bottleneck=False, extension=64, tail=Tail(128, 3, 2, 16)),
    "last": Plan.stage(256, 128, 1, tail=Tail(256, 1)),
}


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [module(x)]


@pytest.fixture
def plain_memory() -> None:
    """CUDA graphs cannot be captured while memory is being filled with NaN."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", STAGES)
def test_stage_follows_float64(case: str, training: bool, dtype: torch.dtype) -> None:
    """Biases keep features away from ReLU's corner, where a rounding moves a gradient at will."""
    plan = STAGES[case]
    stage = randomise(sct.Stage(plan, device="cuda")).train(training)
    with torch.no_grad():
        for norm in (stage.norm, stage.reduce_norm):
            if norm is not None:
                norm.bias += 4
                norm.weight *= 1 if training else 0.2  # running statistics do not hold growth back
    stage = stage.to(dtype)
    x = torch.randn(4, plan.in_channels, 15, 13, device="cuda").to(dtype)
    with sct.use_backend("reference"):
        exact = everything(copy.deepcopy(stage).double(), x.double(), run)
        rounded = everything(stage, x, run)
    got = everything(stage, x, run)
    floor = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for name, value in exact.items():
        assert error(got[name], value) <= 2 * error(rounded[name], value) + floor, name


@facility("torch.use_deterministic_algorithms(True): two runs, the same bits")
def test_two_runs_give_the_same_bits() -> None:
    stage = randomise(sct.Stage(STAGES["b42-stage-1"], device="cuda"))
    x = torch.randn(8, 128, 28, 28, device="cuda")
    first, second = (everything(stage, x, run) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@facility("No host synchronisation in forward or backward")
def test_nothing_waits_for_the_gpu() -> None:
    stage = randomise(sct.Stage(STAGES["b42-stage-1"], device="cuda"))
    x = torch.randn(8, 128, 28, 28, device="cuda")
    stage(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@facility("CUDA graphs by hand: evaluation, make_graphed_callables, a captured training step")
def test_evaluation_is_captured_as_a_graph(plain_memory: None) -> None:
    model = randomise(sct.SeqResNetB22(device="cuda")).eval().bfloat16()
    x = torch.randn(2, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
    assert torch.equal(out, expected)


@facility("CUDA graphs by hand: evaluation, make_graphed_callables, a captured training step")
def test_graphed_callable(plain_memory: None) -> None:
    """Forward and backward of a training stage, captured by PyTorch's own helper."""
    stage = randomise(sct.Stage(STAGES["b42-stage-1"], device="cuda"))
    twin = copy.deepcopy(stage)
    sample = torch.randn(4, 128, 14, 14, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(stage), (sample,))
    x = torch.randn(4, 128, 14, 14, device="cuda", requires_grad=True)
    out = graphed(x)
    (got,) = torch.autograd.grad(out.square().sum(), x)
    other = twin(x)
    (expected,) = torch.autograd.grad(other.square().sum(), x)
    assert torch.equal(out, other) and torch.equal(got, expected)


@facility("CUDA graphs by hand: evaluation, make_graphed_callables, a captured training step")
def test_training_step_is_captured_as_a_graph(plain_memory: None) -> None:
    """Forward, backward and SGD in one graph, replayed: the loss goes as without a graph."""
    start = sct.CifarSeqResNet(16, 1, bottleneck=True, dropout=0.0, device="cuda")
    x = torch.randn(8, 3, 16, 16, device="cuda")
    labels = torch.arange(8, device="cuda")

    def stepper(model: nn.Module) -> tuple[object, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        loss = torch.zeros((), device="cuda")

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            value = nn.functional.cross_entropy(model(x), labels)
            value.backward()
            optimizer.step()
            loss.copy_(value.detach())

        return step, loss

    step, loss = stepper(copy.deepcopy(start))
    expected = []
    for _ in range(8):
        step()
        expected.append(loss.item())
    step, loss = stepper(copy.deepcopy(start))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    got = []
    for _ in range(5):
        graph.replay()
        got.append(loss.item())
    assert got == pytest.approx(expected[3:], rel=1e-3)


def test_twenty_steps_follow_the_reference() -> None:
    """The loss under bfloat16 autocast goes where the reference's goes."""
    torch.manual_seed(0)
    start = sct.CifarSeqResNet(16, 2, bottleneck=True, dropout=0.0, device="cuda")
    x = torch.randn(64, 3, 32, 32, device="cuda")
    target = torch.randint(0, 10, (64,), device="cuda")
    losses = {}
    for backend in ("reference", "triton"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
        with sct.use_backend(backend):
            for _ in range(20):
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(x), target)
                loss.backward()
                optimizer.step()
        losses[backend] = loss.item()
    assert losses["triton"] == pytest.approx(losses["reference"], rel=0.1)


def test_buffer_beyond_32_bit_offsets() -> None:
    """More than 2^31 elements: the last image's output equals that of the image alone."""
    free, _ = torch.cuda.mem_get_info()
    plan = Plan.stage(64, 32, 1, tail=Tail(64, 1))
    images = 2**31 // (plan.total_channels * 256 * 256) + 2
    if free < 3 * images * plan.total_channels * 256 * 256 * 2:
        pytest.skip("too little GPU memory")
    stage = randomise(sct.Stage(plan, device="cuda", dtype=torch.bfloat16)).eval()
    x = torch.randn(images, 64, 256, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(stage(x)[-1:], stage(x[-1:]))

"""What only a GPU can show; `make gpu` runs this first. Everything here is skipped without one."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import error, everything, exact_kernels, randomise
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.plan import Plan, Tail

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]

facility = pytest.mark.facility

STAGES = {
    "b42-stage-1": Plan.stage(128, 32, 1, extension=128, tail=Tail(256, 3, 2, 4)),
    "b42-stage-3": Plan.stage(512, 64, 1, extension=512, tail=Tail(1024, 3, 2, 8)),
    "next-stage-1": Plan.stage(256, 32, 1, subgroups=8, extension=256, tail=Tail(512, 3, 2, 64)),
    "next-entry": Plan.stage(64, 32, 1, entry_channels=64, subgroups=8, tail=Tail(128, 1)),
    "cifar-entry": Plan.stage(64, 8, 1, entry_channels=16, bottleneck=False, extension=64, tail=Tail(128, 3, 2, 16)),
    "last": Plan.stage(256, 128, 1, tail=Tail(256, 1)),
}
# dtype, and the largest relative RMS error. bfloat16 has three bits less than float16. TF32 has as many, but its
# products cut operands short: errors twice as large as rounding's, and all in one direction. (With products cut so in
# the interpreter, gradients of these stages are off by 6.3e-3 at most; float16 is off by 1.1e-3 there.)
PRODUCTS = {
    "exact": (torch.float32, 1e-5),
    "tf32": (torch.float32, 8e-3),
    "float16": (torch.float16, 2e-3),
    "bfloat16": (torch.bfloat16, 1e-2),
}


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [module(x)]


@pytest.fixture
def plain_memory() -> None:
    """CUDA graphs cannot be captured while memory is being filled with NaN."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", STAGES)
def test_stage_follows_float64(case: str, training: bool, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output against float64, every gradient against float64 at the features kept (`rounded.py` says why)."""
    from rounded import compare  # imports Triton, which a machine without a GPU may lack

    plan, (dtype, limit) = STAGES[case], PRODUCTS[products]
    stage = randomise(sct.Stage(plan, dropout=0.1 * (case == "cifar-entry"), device=DEVICE), layer_b=0.5)
    x = torch.randn(4, plan.in_channels, 15, 13, device=DEVICE).to(dtype)
    know_statistics(stage, x)
    stage.train(training)
    with exact_kernels() if products == "exact" else nullcontext():
        errors = {name: error(*pair) for name, pair in compare(stage, x, monkeypatch).items()}
    assert not {name: e for name, e in errors.items() if not e <= limit}


def test_exact_float32_is_pytorchs() -> None:
    """Where TF32 is off the same network computes exactly, without a kernel of ours; where it is on, with them."""
    from seqconv_triton.kernels.launch import record

    stage = randomise(sct.Stage(STAGES["b42-stage-1"], device=DEVICE), layer_b=0.5)
    x = torch.randn(4, 128, 15, 13, device=DEVICE)
    expected = copy.deepcopy(stage).double()(x.double())
    called: list[Any] = []
    with record(lambda *call: called.append(call)):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = everything(stage, x, run)["output 0"]
        assert not called and error(exact, expected) < 1e-5
        fast = everything(stage, x, run)["output 0"]
    assert called and 1e-4 < error(fast, expected) < 8e-3


def know_statistics(stage: sct.Stage, x: Tensor) -> None:
    """Make the running statistics those of x: random ones would not hold back the growth from group to group."""
    norms = [norm for norm in (stage.norm, stage.reduce_norm) if norm is not None]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad(), sct.use_backend("reference"):
        stage.train()(x.float())
    for norm in norms:
        norm.momentum = 0.1


@facility("torch.use_deterministic_algorithms(True): two runs, the same bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    """Some hundred tiles at once: a program that took itself for the last too early would show."""
    stage = randomise(sct.Stage(STAGES["b42-stage-1"], device=DEVICE)).to(dtype)
    x = torch.randn(32, 128, 56, 56, device=DEVICE, dtype=dtype)
    first = everything(stage, x, run)
    for _ in range(20):
        again = everything(stage, x, run)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


@facility("No host synchronisation in forward or backward")
def test_nothing_waits_for_the_gpu() -> None:
    stage = randomise(sct.Stage(STAGES["b42-stage-1"], device=DEVICE))
    x = torch.randn(8, 128, 28, 28, device=DEVICE, requires_grad=True)
    upstream = torch.ones(8, 256, 14, 14, device=DEVICE)
    stage(x).backward(upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage(x).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@facility("CUDA graphs by hand: evaluation, make_graphed_callables, a captured training step")
def test_evaluation_is_captured_as_a_graph(plain_memory: None) -> None:
    model = randomise(sct.SeqResNetB22(device=DEVICE), layer_b=0.1).eval().bfloat16()
    x = torch.randn(2, 3, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
    assert expected.isfinite().all()
    assert error(out, expected) < 1e-3  # the stem's conv may be another one of cuDNN's


@facility("CUDA graphs by hand: evaluation, make_graphed_callables, a captured training step")
def test_graphed_callable(plain_memory: None) -> None:
    """Forward and backward of a training stage, captured by PyTorch's own helper."""
    stage = randomise(sct.Stage(STAGES["b42-stage-1"], device=DEVICE))
    twin = copy.deepcopy(stage)
    sample = torch.randn(4, 128, 14, 14, device=DEVICE, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(stage), (sample,))
    for _ in range(2):
        x = torch.randn(4, 128, 14, 14, device=DEVICE, requires_grad=True)
        out = graphed(x)
        (got,) = torch.autograd.grad(out.square().sum(), x)
        other = twin(x)
        (expected,) = torch.autograd.grad(other.square().sum(), x)
        assert torch.equal(out, other) and torch.equal(got, expected)


@facility("torch.compile modes: reduce-overhead (CUDA graphs on a GPU), max-autotune")
def test_training_step_under_inductors_graphs(plain_memory: None) -> None:
    """Inductor looks for memory in its graphs' pool that outlives a warm-up: a table cached there would be found."""
    stage = randomise(sct.Stage(STAGES["b42-stage-1"], device=DEVICE))
    compiled = torch.compile(copy.deepcopy(stage), mode="reduce-overhead")
    for _ in range(4):  # warm-up, capture, replays
        x = torch.randn(4, 128, 14, 14, device=DEVICE, requires_grad=True)
        torch.compiler.cudagraph_mark_step_begin()
        (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (expected,) = torch.autograd.grad(stage(x).square().sum(), x)
        assert error(got, expected) < 1e-5


def stepper(start: nn.Module, x: Tensor, labels: Tensor) -> tuple[Callable[[], None], Tensor]:
    """A training step of a copy of the model, and where it leaves the loss."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    loss = torch.zeros((), device=x.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        value = nn.functional.cross_entropy(model(x), labels)
        value.backward()
        optimizer.step()
        loss.copy_(value.detach())

    return step, loss


def losses(step: Callable[[], None], loss: Tensor, count: int) -> list[float]:
    found = []
    for _ in range(count):
        step()
        found.append(loss.item())
    return found


@facility("CUDA graphs by hand: evaluation, make_graphed_callables, a captured training step")
def test_training_step_is_captured_as_a_graph(plain_memory: None) -> None:
    """Forward, backward and SGD in one graph, replayed: the loss goes as without a graph."""
    start = sct.CifarSeqResNet(16, 1, bottleneck=True, dropout=0.0, device=DEVICE)
    x = torch.randn(8, 3, 16, 16, device=DEVICE)
    labels = torch.arange(8, device=DEVICE)
    expected = losses(*stepper(start, x, labels), 8)
    step, loss = stepper(start, x, labels)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert losses(graph.replay, loss, 5) == pytest.approx(expected[3:], rel=1e-3)


def twenty_losses(start: nn.Module, x: Tensor, labels: Tensor, backend: str) -> list[float]:
    """Of 20 steps under bfloat16 autocast."""
    step, loss = stepper(start, x, labels)

    def under_autocast() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            step()

    with sct.use_backend(backend):
        return losses(under_autocast, loss, 20)


def test_twenty_steps_follow_the_reference() -> None:
    """All the way: no loss is further from the reference's than a tenth of what 20 steps take off it."""
    torch.manual_seed(0)
    start = sct.CifarSeqResNet(16, 2, bottleneck=True, dropout=0.0, device=DEVICE)
    x = torch.randn(64, 3, 32, 32, device=DEVICE)
    labels = torch.randint(0, 10, (64,), device=DEVICE)
    expected, got = (twenty_losses(start, x, labels, backend) for backend in ("reference", "triton"))
    fall = expected[0] - expected[-1]
    assert fall > 0.5
    assert max(abs(a - b) for a, b in zip(expected, got, strict=True)) < 0.1 * fall


def test_buffer_beyond_32_bit_offsets() -> None:
    """More than 2^31 elements, forward and backward: the last image fares as it does alone."""
    plan = Plan.stage(64, 32, 1, tail=Tail(64, 1))
    pixels = 256 * 256
    images = 2**31 // (plan.total_channels * pixels) + 2
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * images * plan.total_channels * pixels * 2:
        pytest.skip("too little GPU memory")
    stage = randomise(sct.Stage(plan, device=DEVICE, dtype=torch.bfloat16)).eval().requires_grad_(False)
    x = torch.randn(images, 64, 256, 256, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    last = x.detach()[-1:].clone().requires_grad_()
    results = []
    for given in (x, last):
        out = stage(given)
        (gradient,) = torch.autograd.grad(out, given, torch.ones_like(out))
        results.append((out.detach()[-1:].clone(), gradient[-1:].clone()))
        del out, gradient
    for got, expected in zip(*results, strict=True):
        assert expected.isfinite().all() and torch.equal(got, expected)


SMALL_SHAPES = """
import torch
import seqconv_triton as sct
from seqconv_triton.plan import Plan, Tail
torch.manual_seed(0)
for plan in (
    Plan.stage(16, 8, 1, entry_channels=12, subgroups=2, extension=16, tail=Tail(32, 3, 2, 8)),
    Plan.stage(12, 4, 1, bottleneck=False, tail=Tail(12, 1)),
):
    stage = sct.Stage(plan, dropout=0.2, device="cuda").half()
    for size in ((1, 5, 7), (3, 14, 14)):
        x = torch.randn(size[0], plan.in_channels, *size[1:], device="cuda").half().requires_grad_()
        stage.train()(x).sum().backward()
        stage.eval()(x).sum().backward()
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_is_clean(tool: str) -> None:
    """Every tensor in an allocation of its own, so that a byte beyond its end is seen; races in shared memory."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []  # the driver probes for optional functions
    command = [sanitizer, "--tool", tool, *quiet, "--error-exitcode", "9", sys.executable, "-c", SMALL_SHAPES]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TORCH_CUDA_SANITIZER": "0"}
    plain = subprocess.run([sys.executable, "-c", SMALL_SHAPES], env=environment, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr[-3000:]  # compiles, outside the sanitizer
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "done" in done.stdout, (done.stdout + done.stderr)[-3000:]

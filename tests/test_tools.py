"""PyTorch's tools around a model: operation counts, profiler ranges, deterministic mode, opcheck of every op."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slow
import torch
import torch.distributed as dist
from helpers import error, everything, randomise
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import seqconv_triton as sct
from seqconv_triton.backend.contract import Convs, Norms, StageArguments
from seqconv_triton.ops.registered import flatten
from seqconv_triton.plan import Plan, Tail

facility = pytest.mark.facility


def stage_of(**options: object) -> nn.Module:
    return randomise(sct.Stage(Plan.stage(8, 4, 1, extension=8, tail=Tail(16, 1), **options)))


def flops(run: object, backend: str) -> int:
    with sct.use_backend(backend), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@facility("FlopCounterMode counts the fused ops")
@pytest.mark.parametrize(
    "options", [{}, {"bottleneck": False}, {"windowed": False}], ids=["windowed", "basic", "dense"]
)
def test_operations_equal_those_of_plain_convs(options: dict[str, object]) -> None:
    """The reference is made of PyTorch's own convs, which PyTorch counts (rightly where nothing is grouped)."""
    stage = stage_of(**options)
    x = torch.randn(2, 8, 5, 4, requires_grad=True)
    for run in (lambda: stage(x.detach()), lambda: stage(x).sum().backward()):
        assert flops(run, "aten") == flops(run, "reference") > 0
    stage.requires_grad_(False)
    assert flops(lambda: stage(x).sum().backward(), "aten") == 2 * flops(lambda: stage(x), "aten")


@facility("FlopCounterMode counts the fused ops")
def test_operations_of_a_network() -> None:
    """Twice the multiply-adds that `info` prints; recomputing shows as the 1×1 convs once more."""
    from seqconv_triton.tools.info import summarize

    model = sct.SeqResNetB22().eval()
    x = torch.randn(1, 3, 224, 224, device="meta")
    assert flops(lambda: model.to("meta")(x), "aten") == 2 * summarize("seqresnet_b22").multiply_adds
    stage = stage_of()
    images = torch.randn(2, 8, 5, 4, requires_grad=True)
    plain = flops(lambda: stage(images).sum().backward(), "aten")
    stage.recompute = True
    again = flops(lambda: stage(images).sum().backward(), "aten")
    assert again - plain == 2 * 2 * stage.plan.multiply_adds(5, 4)[0]


COUNT = """
import torch, seqconv_triton as sct
layer = sct.SeqConv2d(8, 8, 4)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    {call}(torch.randn(1, 8, 5, 5))
print(counter.get_total_flops())
"""


@facility("FlopCounterMode counts the fused ops")
def test_counter_that_is_imported_last() -> None:
    """Importing the package does not import PyTorch's counter (it would import Triton), and yet it counts."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(call="layer")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == 2 * sum(sct.SeqConv2d(8, 8, 4).plan.multiply_adds(5, 5))


@facility("torch.profiler shows a named range for every stage")
def test_profiler_ranges(place: torch.device) -> None:
    stage = randomise(sct.Stage(Plan.stage(8, 8, 1, tail=Tail(16, 1)))).to(place)
    x = torch.randn(2, 8, 3, 4, device=place)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        stage(x).sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert {"stage_forward 8→16 k8 J2", "stage_backward 8→16 k8 J2"} <= names


@facility("torch.use_deterministic_algorithms(True): two runs, the same bits")
def test_two_runs_give_the_same_bits(place: torch.device) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    stage = randomise(sct.Stage(Plan.stage(8, 8, 1, extension=8, tail=Tail(16, 3, 2, 2)))).to(place)
    x = torch.randn(2, 8, 4, 5, device=place)
    first, second = (everything(stage, x, lambda m, t: [m(t)]) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def training_call(stage: sct.Stage, x: Tensor, group: str, backend: str) -> tuple[object, ...]:
    """The forward op's arguments for a training step, conv weights in x's dtype."""
    convs = Convs(*(weight.detach().to(x.dtype).requires_grad_() for weight in stage.convs()))
    norms = Norms(*(norm._replace(mean=None, var=None) for norm in stage.norms()[0]))
    return (x, None, *flatten(StageArguments(stage.plan, convs, norms), group, backend).values(), True, True)


@facility("opcheck with all its tests, every op, every dtype")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_stem(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 4).to(dtype).requires_grad_()
    weight = torch.randn(4, 3, 3, 3).to(dtype).requires_grad_()
    close = {"atol": torch.finfo(dtype).eps * 100, "rtol": torch.finfo(dtype).eps * 100}
    for stride in (1, 2):
        torch.library.opcheck(torch.ops.seqconv_triton.stem_conv.default, (x, weight, stride), **close)
        out = torch.ops.seqconv_triton.stem_conv(x, weight, stride).detach()
        for needs in ([True, True], [False, True], [True, False]):
            torch.library.opcheck(
                torch.ops.seqconv_triton.stem_conv_backward.default,
                (torch.randn_like(out), x.detach(), weight.detach(), stride, needs), **close,
            )  # fmt: skip


@pytest.fixture
def group() -> Iterator[str]:
    """The name of a process group of this process alone."""
    if not dist.is_available():
        pytest.skip("torch is built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@facility("opcheck with all its tests, every op, every dtype")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_over_ranks(group: str, dtype: torch.dtype) -> None:
    own = torch.randn(3, 2).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.seqconv_triton.sum_over_ranks.default, (own, group))
    stage = randomise(sct.Stage(Plan.stage(4, 4, 1, tail=Tail(4, 1))))
    stage = stage.double() if dtype == torch.float64 else stage
    x = torch.randn(2, 4, 2, 3).to(dtype).requires_grad_()
    torch.library.opcheck(
        torch.ops.seqconv_triton.stage_forward.default,
        training_call(stage, x, group, "aten"),
        atol=torch.finfo(dtype).eps * 100, rtol=torch.finfo(dtype).eps * 100,
    )  # fmt: skip


@facility("opcheck with all its tests, every op, every dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("place", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_opcheck_stage(place: torch.device, dtype: torch.dtype) -> None:
    stage = randomise(sct.Stage(Plan.stage(4, 4, 1, tail=Tail(4, 1)))).to(place)
    x = torch.randn(2, 4, 2, 3, device=place).to(dtype).requires_grad_()
    torch.library.opcheck(
        torch.ops.seqconv_triton.stage_forward.default,
        training_call(stage, x, "", "triton"),
        atol=torch.finfo(dtype).eps * 100, rtol=torch.finfo(dtype).eps * 100,
    )  # fmt: skip


def batched_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: p.expand(2, *p.shape) for name, p in layer.named_parameters()}
    return torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(parameters)


CANNOT = {
    "vmap-gradients": (batched_gradient, NotImplementedError, r'use_backend\("reference"\)'),
    "script": (lambda layer, x: torch.jit.script(layer), NotImplementedError, r"torch\.jit\.trace"),
    "one-value": (lambda layer, x: layer.train()(x[:1, :, :1, :1]), ValueError, "one value per channel"),
    "raw-changed": (
        lambda layer, x: layer.forward_raw(x)[0].mul_(2).sum().backward(),
        RuntimeError,
        "modified by an inplace operation",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_work_says_so(case: str) -> None:
    """The rows of docs/facilities.md that no other test looks at."""
    call, kind, message = CANNOT[case]
    with pytest.raises(kind, match=message):
        call(randomise(sct.SeqConv2d(3, 8, 4)).eval(), torch.randn(2, 3, 5, 5))


def test_layers_under_vmap() -> None:
    layer, x = randomise(sct.SeqConv2d(3, 8, 4)).eval().requires_grad_(False), torch.randn(2, 2, 3, 5, 5)
    expected = torch.stack([layer(images) for images in x])
    for backend in ("aten", "reference"):
        with sct.use_backend(backend):
            assert error(torch.func.vmap(layer)(x), expected) < 1e-6


def test_every_slow_test_exists(request: pytest.FixtureRequest) -> None:
    if any("::" in argument for argument in request.config.args):
        pytest.skip("of this file not all was collected")
    assert not slow.missing()


def test_the_table_of_facilities_is_that_of_the_tests() -> None:
    """`make facilities` writes the table; here every facility has a row, every test named exists, and none failed."""
    folder = Path(__file__).parent
    text = (folder.parent / "docs" / "facilities.md").read_text(encoding="utf-8")
    _, _, table = text.partition("<!-- table: make facilities -->")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    sources = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("test_*.py")}
    markers = {name for source in sources.values() for name in re.findall(r'facility\(\s*"(\w[^"\n]+)"', source)}
    assert markers <= set(rows)
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", table)
    assert len(named) > len(markers)
    for file, test in named:
        assert f"def {test}(" in sources[file], test
    assert "✗" not in table

"""Mixed precision: autocast with float32 statistics, GradScaler, whole models in bfloat16, training in bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import error, everything, randomise, small_imagenet
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.backend.aten import precision
from seqconv_triton.backend.aten.parts import Norm
from seqconv_triton.plan import Plan, Tail

facility = pytest.mark.facility
HALVES = [torch.bfloat16, torch.float16]


def small_stage() -> sct.Stage:
    """Biases keep features away from ReLU's corner, where a rounding moves a gradient at will."""
    stage = randomise(sct.Stage(Plan.stage(8, 8, 1, extension=8, tail=Tail(16, 3, 2, 2))))
    with torch.no_grad():
        stage.norm.bias += 4
        stage.reduce_norm.bias += 4
    return stage


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [module(x)]


@facility("autocast bfloat16 and float16: float32 BN, statistics and master weights")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(place: torch.device, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if dtype == torch.bfloat16 and "interpreter" in request.node.callspec.params.values():
        pytest.skip("the interpreter's bfloat16 products are wrong")
    check_autocast(place, dtype)


def check_autocast(place: torch.device, dtype: torch.dtype) -> None:
    """Every result as near to float64 as the concatenating code's under the same autocast."""
    stage = small_stage().to(place)
    x = torch.randn(4, 8, 6, 5, device=place)
    with sct.use_backend("reference"):
        exact = everything(copy.deepcopy(stage).double(), x.double(), run)
        with torch.autocast(place.type, dtype):
            rounded = everything(stage, x, run)
    with torch.autocast(place.type, dtype):
        got = everything(stage, x, run)
    assert got["output 0"].dtype == dtype
    rounding = torch.finfo(dtype).eps
    for name, value in got.items():
        if name != "output 0" and value.is_floating_point():
            assert value.dtype == torch.float32, name
        if "running" in name or name == "output 0":
            assert error(value, exact[name]) < 8 * rounding, name
        assert error(value, exact[name]) < 2 * error(rounded[name], exact[name]) + 8 * rounding, name


@facility("half precision on CPUs without instructions for it: computed in float32, rounded once")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("fast", [True, False], ids=["in half precision", "in float32"])
def test_either_kind_of_processor(fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fast_in", lambda _: fast)
    check_autocast(torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("pack", [None, False, True], ids=["as it is", "fused", "packed"])
def test_evaluation_in_float32_is_rounded_once_a_stage(
    pack: bool | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "fast_in", lambda _: False)
    model = nn.Sequential(randomise(sct.SeqConv2d(12, 24, 8, bottleneck=True))).eval()
    half = (model if pack is None else sct.fuse(model, pack=pack)).to(dtype)
    x = torch.randn(3, 12, 7, 5).to(dtype)
    assert torch.equal(half(x), copy.deepcopy(half).float()(x.float()).to(dtype))


@facility("sct.fuse(model).bfloat16() on a CPU: BN folded, as near to float64 as unfused")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("under_autocast", [False, True], ids=["cast", "autocast"])
def test_fused_evaluation(dtype: torch.dtype, under_autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a BN of its own behind a conv: raw outputs are not rounded on their way to it."""
    monkeypatch.setattr(precision, "fast_in", lambda _: True)
    model = randomise(small_imagenet(), layer_b=0.1).eval()
    x = torch.randn(4, 3, 32, 32)
    exact = copy.deepcopy(model).double()(x.double())
    errors = []
    for half in (model, sct.fuse(model)):
        with torch.autocast("cpu", dtype, enabled=under_autocast), torch.no_grad():
            got = half(x) if under_autocast else copy.deepcopy(half).to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        errors.append(error(got, exact))
        monkeypatch.delattr(Norm, "normalize", raising=False)  # of the aten backend; fused models do without
    plain, fused = errors
    assert fused < 1.25 * plain < (0.02 if dtype == torch.bfloat16 else 0.0025), errors


@facility("GradScaler: scaled float16 steps, and a step with infinities is skipped")
@pytest.mark.parametrize("place", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_grad_scaler(place: torch.device) -> None:
    model = sct.CifarSeqResNet(8, 1, bottleneck=True, dropout=0.0).to(place)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(place.type, init_scale=2.0**10)
    x, labels = torch.randn(16, 3, 8, 8, device=place), torch.arange(16, device=place) % 10
    losses = []
    for number in range(12):
        optimizer.zero_grad()
        with torch.autocast(place.type, torch.float16):
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss * (float("inf") if number == 5 else 1)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == (number != 5)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@facility("model.bfloat16(): a whole model in bfloat16, statistics computed in float32")
@pytest.mark.parametrize("place", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_whole_model_in_bfloat16(place: torch.device, training: bool) -> None:
    model = randomise(sct.CifarSeqResNet(8, 1, bottleneck=True, dropout=0.0), layer_b=0.1).to(place).train(training)
    x = torch.randn(8, 3, 8, 8, device=place).bfloat16()
    half = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(half).double()
    out = half(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in half.parameters())
    rounding = torch.finfo(torch.bfloat16).eps
    with sct.use_backend("reference"):
        assert error(out, exact(x.double())) < 4 * rounding
    for name, value in exact.named_buffers():
        assert error(dict(half.named_buffers())[name], value) < rounding, name


@facility("200 steps on the demo's digits in bfloat16 autocast end within noise of float32")
def test_bfloat16_training_follows_float32() -> None:
    """Noise is what another seed makes of float32 training; bfloat16 may not be further away than that."""
    digits = pytest.importorskip("recipes.training.digits", reason="scikit-learn is not installed").load()

    def train(seed: int, half: bool) -> tuple[float, float]:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = sct.CifarSeqResNet(16, 1, in_chans=1, bottleneck=True, dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
        steps, losses = 0, []
        while steps < 200:
            for x, labels in digits.training_batches(32, 0.0, generator):
                if steps == 200:
                    break
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    loss = F.cross_entropy(model(x), labels)
                loss.backward()
                optimizer.step()
                steps += 1
                losses.append(loss.item())
        with torch.no_grad():
            right = model.eval()(digits.normalize(digits.test.images)).argmax(1) == digits.test.labels
        return sum(losses[-40:]) / 40, right.double().mean().item()

    (loss, accuracy), (other_loss, other_accuracy), (half_loss, half_accuracy) = (
        train(0, False), train(1, False), train(0, True),
    )  # fmt: skip
    assert accuracy > 0.9
    assert abs(half_loss - loss) < max(2 * abs(other_loss - loss), 0.03)
    assert abs(half_accuracy - accuracy) <= max(2 * abs(other_accuracy - accuracy), 0.02)

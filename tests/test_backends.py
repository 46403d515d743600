"""The aten backend against the reference in float64: outputs, every gradient and running statistic."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from helpers import assert_backends_agree, error, everything, randomise
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.backend.aten import evaluation as aten_evaluation
from seqconv_triton.backend.aten.evaluation import FoldedGroups
from seqconv_triton.backend.aten.ring import Ring
from seqconv_triton.plan import Plan, Tail

TOLERANCE = 1e-11

# id: in_channels, out_channels, group_width, options, image [N, H, W]
LAYERS = {
    "basic": (12, 12, 4, {}, (2, 5, 3)),
    "bottleneck": (12, 12, 4, {"bottleneck": True}, (2, 5, 3)),
    "subgroups-2": (12, 12, 4, {"bottleneck": True, "subgroups": 2}, (2, 4, 4)),
    "subgroups-k": (12, 12, 4, {"bottleneck": True, "subgroups": 4}, (2, 4, 4)),
    "window-cuts-a-group": (10, 24, 4, {"bottleneck": True}, (1, 3, 5)),
    "window-cuts-a-group-basic": (10, 24, 4, {}, (1, 3, 5)),
    "wider-than-input": (3, 40, 5, {"bottleneck": True}, (2, 3, 3)),
    "narrower-than-group": (2, 12, 4, {}, (2, 3, 3)),
    "k1": (3, 5, 1, {"bottleneck": True}, (2, 3, 2)),
    "one-group": (7, 8, 8, {"bottleneck": True}, (2, 3, 3)),
    "dense": (8, 24, 4, {"windowed": False}, (2, 5, 3)),
    "dense-bottleneck": (7, 24, 4, {"windowed": False, "bottleneck": True, "subgroups": 2}, (2, 5, 3)),
    "dropout": (8, 24, 4, {"dropout": 0.3, "bottleneck": True}, (3, 5, 3)),
    "dropout-basic-dense": (8, 24, 4, {"dropout": 0.3, "windowed": False}, (3, 5, 3)),
    "leaves-in-parts": (8, 20, 4, {"bottleneck": True}, (2, 5, 3)),
    "one-pixel": (12, 12, 4, {"bottleneck": True}, (3, 1, 1)),
    "one-row": (12, 12, 4, {}, (1, 1, 7)),
    "k48": (96, 96, 48, {"bottleneck": True}, (1, 3, 3)),
    "many-strips": (4, 96, 2, {"bottleneck": True}, (1, 3, 3)),
}

BLOCKS = {
    "bottleneck": {},
    "basic": {"bottleneck": False},
    "subgroups": {"subgroups": 2},
    "dense": {"windowed": False},
    "dense-basic": {"windowed": False, "bottleneck": False},
}
ENDS = {
    "plain": {},
    "downsizing": {"tail": Tail(24, 3, 2, 6)},
    "extension": {"extension": 12, "tail": Tail(24, 3, 2, 6)},
    "published-quirk": {"extension": 12, "tail": Tail(24, 3, 2, 6, repeats=2)},
    "entry-and-1x1": {"entry_channels": 5, "tail": Tail(12, 1)},
    "entry-in-the-ring": {"entry_channels": 4, "tail": Tail(12, 1)},
    "entry-that-turns-it": {"entry_channels": 8, "tail": Tail(24, 3, 2, 6)},
}


def run_layer(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
    return [module(x)]


def run_layer_raw(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """With a shortcut that depends on x, so that its gradient counts."""
    channels = module.plan.out_channels
    return module.forward_raw(x, torch.sin(x[:, :1]).expand(-1, channels, -1, -1))


def run_stage(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
    return [module(x)]


def run_stage_features(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
    return module.forward_features(x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("run", [run_layer, run_layer_raw])
def test_layer_equals_reference(case: str, training: bool, run: object) -> None:
    channels, out, k, options, (images, height, width) = LAYERS[case]
    layer = randomise(sct.SeqConv2d(channels, out, k, dtype=torch.float64, **options)).train(training)
    x = torch.randn(images, channels, height, width, dtype=torch.float64)
    assert_backends_agree(layer, x, run, TOLERANCE)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_stage_equals_reference(block: str, end: str, training: bool, dropout: float) -> None:
    plan = Plan.stage(12, 4, 3, **BLOCKS[block], **ENDS[end])
    stage = randomise(sct.Stage(plan, dropout=dropout, dtype=torch.float64)).train(training)
    x = torch.randn(2, plan.in_channels, 5, 6, dtype=torch.float64)
    assert_backends_agree(stage, x, run_stage, TOLERANCE)
    assert_backends_agree(stage, x, run_stage_features, TOLERANCE)


def test_evaluation_without_gradients_takes_images_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of images, and the folded fast path, give what one pass with gradients gives."""
    plan = Plan.stage(12, 4, 3, extension=12, tail=Tail(24, 3, 2, 6))
    stage = randomise(sct.Stage(plan, dtype=torch.float64)).eval()
    x = torch.randn(5, 12, 5, 6, dtype=torch.float64)
    with sct.use_backend("reference"):
        expected = stage(x)
    monkeypatch.setattr(aten_evaluation, "CHUNK_BYTES", 12 * 30 * 8 * 2)
    chunks = []
    begin = FoldedGroups.begin
    monkeypatch.setattr(FoldedGroups, "begin", lambda self, x: chunks.append(x.shape[0]) or begin(self, x))
    with torch.no_grad():
        assert error(stage(x), expected) < TOLERANCE
    assert chunks == [2, 2, 1]


def test_an_image_of_nan_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is used again for the next images; what they have not written yet must not be read as NaN."""
    plan = Plan.stage(12, 4, 1, entry_channels=4)
    assert Ring(plan).reads_unwritten
    monkeypatch.setattr(aten_evaluation, "CHUNK_BYTES", 1)
    stage = randomise(sct.Stage(plan)).eval()
    x = torch.randn(3, 4, 5, 6)
    with torch.no_grad():
        expected = stage(x)
        x[1] = torch.nan
        got = stage(x)
    assert got[1].isnan().any()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_wide_groups_and_many_pixels_in_float32() -> None:
    """Enough of both for oneDNN's weight gradients and products that add."""
    plan = Plan.stage(32, 16, 1, entry_channels=16, tail=Tail(32, 1))
    stage = randomise(sct.Stage(plan), layer_b=0.1)
    x = torch.randn(2, 16, 11, 13)
    got = everything(stage, x, run_stage)
    with sct.use_backend("reference"):
        expected = everything(stage.double(), x.double(), run_stage)
    assert max(error(got[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize("block", BLOCKS)
def test_stage_in_float32(block: str) -> None:
    """float32 takes other products than float64: oneDNN's, where PyTorch has it."""
    for entry, extension in ((None, 12), (None, 0), (4, 0), (8, 0), (8, 12), (6, 12)):
        plan = Plan.stage(12, 4, 3, extension=extension, entry_channels=entry, tail=Tail(24, 3, 2, 6), **BLOCKS[block])
        stage = randomise(sct.Stage(plan), layer_b=0.1)
        x = torch.randn(2, plan.in_channels, 5, 6)
        got = everything(stage, x, run_stage)
        evaluated = stage.eval()(x).detach()
        with torch.no_grad():
            folded = stage(x)
        with sct.use_backend("reference"):
            expected = everything(stage.double().train(), x.double(), run_stage)
            assert max(error(got[name], expected[name]) for name in expected) < 1e-5
            expected_evaluated = stage.eval()(x.double())
        assert max(error(value, expected_evaluated) for value in (evaluated, folded)) < 1e-5


@pytest.mark.parametrize("case", LAYERS)
def test_evaluation_without_gradients_equals_reference(case: str) -> None:
    """The folded pass, with a shortcut and without."""
    channels, out, k, options, (images, height, width) = LAYERS[case]
    layer = randomise(sct.SeqConv2d(channels, out, k, dtype=torch.float64, **options)).eval()
    x = torch.randn(images, channels, height, width, dtype=torch.float64)
    norms, statistics = layer.norms()
    call = partial(sct.ops.stage.stage, x, layer.convs(), norms, layer.plan, statistics=statistics)
    shortcut = torch.randn(images, out, height, width, dtype=torch.float64)
    for added in (None, shortcut):
        with torch.no_grad():
            got = call(shortcut=added).out
            with sct.use_backend("reference"):
                expected = call(shortcut=added).out
        assert error(got, expected) < TOLERANCE


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_stage_evaluation_without_gradients_equals_reference(block: str, end: str) -> None:
    plan = Plan.stage(12, 4, 3, **BLOCKS[block], **ENDS[end])
    stage = randomise(sct.Stage(plan, dtype=torch.float64)).eval()
    x = torch.randn(2, plan.in_channels, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        got = stage(x)
        with sct.use_backend("reference"):
            assert error(got, stage(x)) < TOLERANCE


def test_frozen_parameters_get_no_gradient_and_change_no_other() -> None:
    plan = Plan.stage(12, 4, 1, extension=12, tail=Tail(24, 3, 2, 6))
    stage = randomise(sct.Stage(plan, dtype=torch.float64))
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    full = everything(stage, x, run_stage)
    for name in ("reduce_weight", "transform_weight", "tail_weight"):
        getattr(stage, name).requires_grad_(False)
    stage.norm.weight.requires_grad_(False)
    part = everything(stage, x, run_stage)
    assert set(full) - set(part) == {"reduce_weight", "transform_weight", "tail_weight", "norm.weight"}
    for name, value in part.items():
        assert torch.equal(value, full[name]), name


@pytest.mark.parametrize("shape", [(0, 12, 5, 6), (0, 12, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_no_images(shape: tuple[int, ...], training: bool) -> None:
    """An empty batch gives empty outputs, zero gradients, and leaves statistics alone, but for their count."""
    plan = Plan.stage(12, 4, 1, extension=12, tail=Tail(24, 3, 2, 6))
    stage = randomise(sct.Stage(plan)).train(training)
    before = {name: value.clone() for name, value in stage.named_buffers()}
    x = torch.randn(shape, requires_grad=True)
    out = stage(x)
    assert out.shape == (0, 24, plan.out_size(shape[2]), plan.out_size(shape[3]))
    out.sum().backward()
    assert x.grad.shape == shape
    assert all(p.grad.count_nonzero() == 0 for p in stage.parameters())
    for name, value in stage.named_buffers():
        assert torch.equal(value, before[name] + (training and "tracked" in name)), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
def test_any_memory_layout(layout: str) -> None:
    layer = randomise(sct.SeqConv2d(12, 12, 4, bottleneck=True, dtype=torch.float64))
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64)
    given = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": torch.stack([x, x], -1)[..., 0],
        "expanded": x[:, :, :1].expand(-1, -1, 5, -1),
    }[layout]
    with sct.use_backend("reference"):
        expected = layer(given.contiguous())
    out = layer(given)
    assert error(out, expected) < TOLERANCE
    plain = torch.nn.Conv2d(12, 12, 3, padding=1, dtype=torch.float64)(given)
    assert out.stride() == plain.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_lower_precision_rounds_no_more_than_the_reference(dtype: torch.dtype, training: bool) -> None:
    """Against float64, within twice the error that the reference itself makes in that precision."""
    plan = Plan.stage(16, 8, 1, extension=16, tail=Tail(32, 3, 2, 4))
    stage = randomise(sct.Stage(plan)).train(training).to(dtype)
    x = torch.randn(4, 16, 6, 6).to(dtype)
    with sct.use_backend("reference"):
        exact = everything(copy.deepcopy(stage).double(), x.double(), run_stage)
        rounded = everything(stage, x, run_stage)
    got = everything(stage, x, run_stage)
    assert got["output 0"].dtype == dtype
    floor = 2 * torch.finfo(dtype).eps
    for name, value in exact.items():
        assert error(got[name], value) <= 2 * error(rounded[name], value) + floor, name


def test_ten_steps_of_sgd_agree() -> None:
    """Both backends' weights stay together over ten steps from the published initialisation."""
    start = sct.CifarSeqResNet(4, 1, bottleneck=True, dtype=torch.float64)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    target = torch.randint(0, 10, (4,))
    trained = {}
    for backend in ("reference", "aten"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
        torch.manual_seed(3)
        with sct.use_backend(backend):
            for _ in range(10):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), target).backward()
                optimizer.step()
        trained[backend] = model.state_dict()
    moved = error(trained["aten"]["stages.0.transform_weight"], start.stages[0].transform_weight)
    assert moved > 1e-2
    for name, value in trained["reference"].items():
        assert error(trained["aten"][name], value) < 1e-8, name

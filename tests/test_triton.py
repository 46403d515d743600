"""The Triton backend in the interpreter, against the float64 reference: outputs, every gradient, running statistics.

bfloat16 is left to real GPUs: its matrix products are wrong in the interpreter.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import Run, error, everything, randomise
from rounded import compare
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.kernels.configs import pin
from seqconv_triton.models.imagenet import ImageNetNetwork, StageRow
from seqconv_triton.plan import Plan, Tail

pytest.importorskip("triton", reason="Triton is for Linux only")

# id: in_channels, out_channels, group_width, options, image [N, H, W]
LAYERS = {
    "basic": (12, 12, 4, {}, (2, 5, 3)),
    "basic-k8-dropout": (16, 24, 8, {"dropout": 0.3}, (1, 2, 14)),
    "basic-k24": (24, 48, 24, {}, (3, 7, 1)),
    "basic-dense-dropout": (8, 24, 8, {"windowed": False, "dropout": 0.2}, (3, 5, 2)),
    "basic-dense-k16": (5, 48, 16, {"windowed": False}, (1, 7, 7)),
    "window-cuts-a-group": (10, 24, 4, {"bottleneck": True, "subgroups": 2, "dropout": 0.3}, (3, 2, 5)),
    "window-narrower-than-a-group": (3, 16, 8, {"bottleneck": True}, (1, 5, 5)),
    "k8": (16, 24, 8, {"bottleneck": True}, (3, 7, 5)),
    "k8-s2": (24, 24, 8, {"bottleneck": True, "subgroups": 2}, (1, 14, 2)),
    "k8-s8": (8, 16, 8, {"bottleneck": True, "subgroups": 8}, (1, 7, 5)),
    "k16-s8-dropout": (40, 32, 16, {"bottleneck": True, "subgroups": 8, "dropout": 0.2}, (3, 2, 2)),
    "k16-s16": (32, 32, 16, {"bottleneck": True, "subgroups": 16}, (1, 5, 5)),
    "k24-s2-no-power-of-two": (24, 24, 24, {"bottleneck": True, "subgroups": 2}, (1, 2, 2)),
    "k24-s8": (48, 48, 24, {"bottleneck": True, "subgroups": 8}, (1, 5, 7)),
    "k32-s8": (32, 64, 32, {"bottleneck": True, "subgroups": 8}, (1, 5, 2)),
    "k32-s32": (32, 32, 32, {"bottleneck": True, "subgroups": 32}, (3, 2, 5)),
    "k48": (48, 48, 48, {"bottleneck": True}, (1, 1, 7)),
    "k48-s2": (48, 48, 48, {"bottleneck": True, "subgroups": 2}, (1, 2, 7)),
    "k128": (128, 128, 128, {"bottleneck": True}, (3, 1, 1)),
    "k128-s8": (128, 128, 128, {"bottleneck": True, "subgroups": 8}, (1, 1, 5)),
    "dense-bottleneck": (7, 24, 4, {"windowed": False, "bottleneck": True}, (2, 5, 3)),
    "dense-k16-s2": (16, 48, 16, {"windowed": False, "bottleneck": True, "subgroups": 2}, (1, 7, 2)),
    "more-pixels-than-a-tile": (8, 8, 8, {"bottleneck": True}, (3, 7, 14)),
    "14x14": (16, 16, 8, {"bottleneck": True}, (1, 14, 14)),
}
STAGES = {
    "extension": (Plan.stage(12, 4, 1, extension=12, tail=Tail(24, 3, 2, 6)), 0.0),
    "quirk-subgroups": (Plan.stage(16, 8, 1, extension=16, subgroups=2, tail=Tail(32, 3, 2, 8, repeats=2)), 0.0),
    "entry-dropout-1x1": (Plan.stage(12, 4, 1, entry_channels=5, bottleneck=False, tail=Tail(12, 1)), 0.2),
    "dense": (Plan.stage(8, 4, 1, windowed=False, extension=8, tail=Tail(16, 3, 2, 4)), 0.0),
}


def layer_raw(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return module.forward_raw(x, torch.sin(x[:, :1]).expand(-1, module.plan.out_channels, -1, -1))


def stage_features(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return module.forward_features(x)


def assert_follows_float64(module: nn.Module, x: Tensor, run: Run, tolerance: float) -> None:
    with sct.use_backend("reference"):
        exact = everything(copy.deepcopy(module).double(), x.double(), run)
    with sct.use_backend("triton"):
        got = everything(module, x, run)
    errors = {name: error(got[name], value) for name, value in exact.items()}
    wrong = {name: e for name, e in errors.items() if not e <= tolerance}
    assert not wrong, wrong


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", LAYERS)
def test_layer_follows_float64(case: str, training: bool) -> None:
    channels, out, k, options, (images, height, width) = LAYERS[case]
    layer = randomise(sct.SeqConv2d(channels, out, k, **options)).train(training)
    assert_follows_float64(layer, torch.randn(images, channels, height, width), layer_raw, 1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", STAGES)
def test_stage_follows_float64(case: str, training: bool) -> None:
    plan, dropout = STAGES[case]
    stage = randomise(sct.Stage(plan, dropout=dropout)).train(training)
    assert_follows_float64(stage, torch.randn(2, plan.in_channels, 5, 3), stage_features, 1e-5)


def test_basic_layers_over_many_tiles() -> None:
    """A program reads its neighbours' pixels of the gradient before: no other may have written over them."""
    layer = randomise(sct.SeqConv2d(12, 12, 4))
    with pin("pull", 16, 16):
        assert_follows_float64(layer, torch.randn(2, 12, 5, 5), layer_raw, 1e-5)


@pytest.mark.parametrize("layout", ["channels-last", "every-second-channel", "transposed"])
def test_any_layout_of_input_and_shortcut(layout: str) -> None:
    layer = randomise(sct.SeqConv2d(8, 16, 8, bottleneck=True))

    def run(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        shortcut = torch.cat([x, -x], 1)
        if layout == "channels-last":
            x, shortcut = (t.contiguous(memory_format=torch.channels_last) for t in (x, shortcut))
        elif layout == "every-second-channel":
            x, shortcut = (t.repeat_interleave(2, 1)[:, ::2] for t in (x, shortcut))
        else:
            x, shortcut = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, shortcut))
        return module.forward_raw(x, shortcut)

    assert_follows_float64(layer, torch.randn(3, 8, 5, 2), run, 1e-5)


@pytest.mark.parametrize("frozen", ["norm", "reduce_norm", "reduce_weight", "transform_weight", "tail_weight", "all"])
def test_frozen_parameters(frozen: str) -> None:
    """What is frozen gets no gradient; every other gradient stays right, that of the input with it."""
    stage = randomise(sct.Stage(Plan.stage(8, 4, 1, extension=4, tail=Tail(8, 3, 2, 2))))
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(not (frozen == "all" or name.split(".")[0] == frozen))
    assert_follows_float64(stage, torch.randn(2, 8, 5, 3), stage_features, 1e-5)


def test_layer_without_a_gradient_of_its_input() -> None:
    """Nothing pulls the first group's gradient through to the input, but its weights need it."""
    for bottleneck in (True, False):
        layer = randomise(sct.SeqConv2d(8, 12, 4, bottleneck=bottleneck))
        assert_follows_float64(layer, torch.randn(2, 8, 5, 3), lambda m, x: [m(x.detach()) + 0 * x.sum()], 1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", STAGES)
def test_half_precision(case: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16: the output within 2e-3 of float64, every gradient within 2e-3 of float64 at the features kept."""
    plan, dropout = STAGES[case]
    stage = randomise(sct.Stage(plan, dropout=dropout)).train(training)
    x = torch.randn(3, plan.in_channels, 5, 4).half()
    errors = {name: error(*pair) for name, pair in compare(stage, x, monkeypatch).items()}
    assert len(errors) == 2 + len(list(stage.parameters()))
    assert not {name: e for name, e in errors.items() if not e < 2e-3}


class TinyImageNetNetwork(ImageNetNetwork):
    rows = (StageRow(16, 8, 1, 1), StageRow(32, 16, 1, 1))


class TinyNeXt(ImageNetNetwork):
    rows = (StageRow(16, 8, 4, 1), StageRow(32, 16, 8, 1))


NETWORKS = {
    "cifar-basic": (partial(sct.CifarSeqResNet, 16, 1, dropout=0.0), 6),
    "cifar-bottleneck": (partial(sct.CifarSeqResNet, 16, 1, bottleneck=True, dropout=0.0), 6),
    "cifar-dense": (partial(sct.CifarSeqResNet, 16, 1, windowed=False, bottleneck=True, dropout=0.0), 5),
    "imagenet": (TinyImageNetNetwork, 24),
    "imagenet-next": (TinyNeXt, 24),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", NETWORKS)
def test_networks_follow_float64(case: str, training: bool) -> None:
    """Layers B at a tenth of full scale. Depth amplifies float32 rounding: the reference's own is the yardstick."""
    build, size = NETWORKS[case]
    model = randomise(build(num_classes=10), layer_b=0.1).train(training)
    x = torch.randn(2, 3, size, size - 1)
    with sct.use_backend("reference"):
        exact = everything(copy.deepcopy(model).double(), x.double(), lambda m, t: [m(t)])
        rounded = everything(model, x, lambda m, t: [m(t)])
    with sct.use_backend("triton"):
        got = everything(model, x, lambda m, t: [m(t)])
    assert error(got["output 0"], exact["output 0"]) < 1e-5
    wrong = {
        name: error(got[name], value)
        for name, value in exact.items()
        if not error(got[name], value) <= 1e-5 + 3 * error(rounded[name], value)
    }
    assert not wrong, wrong


def test_statistics_keep_digits_far_from_zero() -> None:
    """Mean 1e3 and deviation 1 keep four digits: Chan's combination, not a difference of squares."""
    stage = sct.Stage(Plan.stage(4, 4, 0, extension=4, tail=Tail(8, 1)))
    x = torch.randn(3, 4, 9, 11) + 1e3
    with sct.use_backend("triton"):
        stage(x)
    var = stage.norm.running_var[:4].double()
    expected = 0.9 + 0.1 * x.double().var((0, 2, 3), unbiased=True)
    assert ((var - expected).abs() / expected).max() < 1e-4


def test_two_runs_give_the_same_bits() -> None:
    stage = randomise(sct.Stage(STAGES["extension"][0]))
    x = torch.randn(2, 12, 5, 3)
    with sct.use_backend("triton"):
        first, second = (everything(stage, x, stage_features) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_empty_batch_and_refusals() -> None:
    layer = sct.SeqConv2d(4, 4, 2)
    with sct.use_backend("triton"):
        assert layer(torch.randn(0, 4, 3, 3)).shape == (0, 4, 3, 3)
        with pytest.raises(TypeError, match=r"float64.*float32, float16 and bfloat16"):
            layer.double()(torch.randn(1, 4, 3, 3, dtype=torch.float64))


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqconv_triton.backend.triton.parts.INTERPRETED", False)
    with sct.use_backend("triton"), pytest.raises(ValueError, match="needs a GPU"):
        sct.SeqConv2d(4, 4, 2)(torch.randn(1, 4, 3, 3))

"""Whole networks: against the oracle and between backends in float64, timm's conventions, and bad input."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial

import oracle
import pytest
import torch
from helpers import assert_backends_agree, error, everything, randomise, small_imagenet
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.interop.published import export_published
from seqconv_triton.models.backbone import chosen_stages


def run(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
    return [module(x)]


def run_intermediates(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
    last, features = module.forward_intermediates(x)
    return [module.forward_head(last), *features]


ORACLES = {
    "seqresnet_b22": "seqresnet_b22",
    "seqresnext_24": "seqresnext_24",
    "cifar_seqresnet_r4_k8": "seqresnet_r4_k8",
    "cifar_seqresnet_b_r7_k16": "seqresnet_b_r7_k16",
    "cifar_seqresnet_dense_r3_k8_n121": "ablation_dense_r3_k8",
}


# Small relatives of every family: the full-size networks' figures are checked in test_summary.py.
SMALL = {
    "imagenet": lambda: small_imagenet().double(),
    "imagenet-quirk": lambda: small_imagenet(repeat_extension=True).double(),
    "cifar": lambda: sct.CifarSeqResNet(4, 1, dropout=0.0, dtype=torch.float64),
    "cifar-bottleneck": lambda: sct.CifarSeqResNet(8, 1, (1, 2, 1), bottleneck=True, dropout=0.2, dtype=torch.float64),
    "cifar-dense": lambda: sct.CifarSeqResNet(8, 1, (1, 2, 1), windowed=False, dropout=0.2, dtype=torch.float64),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", SMALL)
def test_network_equals_reference(family: str, training: bool) -> None:
    model = randomise(SMALL[family]()).train(training)
    x = torch.randn(3, 3, 37, 33, dtype=torch.float64) if "imagenet" in family else torch.randn(3, 3, 9, 8).double()
    assert_backends_agree(model, x, run, 1e-8)
    assert_backends_agree(model, x, run_intermediates, 1e-8)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["seqresnet_b42", "seqresnext_24"])
def test_full_network_equals_reference(name: str, training: bool) -> None:
    model = randomise(sct.create_model(name, dtype=torch.float64), layer_b=0.1).train(training)
    assert_backends_agree(model, torch.randn(2, 3, 64, 64, dtype=torch.float64), run, 1e-8)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ORACLES)
def test_reference_equals_the_oracle(name: str, training: bool) -> None:
    """The oracle in tests/ was written from the paper alone; it gets our weights under their published names."""
    options = {} if name.startswith("seqresne") else {"dropout": 0.0}
    model = randomise(sct.create_model(name, dtype=torch.float64, **options), layer_b=0.1).train(training)
    other = getattr(oracle, ORACLES[name])().double().train(training)
    other.load_state_dict(export_published(model))
    size = 64 if name.startswith("seqresne") else 16
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with sct.use_backend("reference"):
        out = model(mine)
    expected = other(theirs)
    assert error(out, expected) < 1e-8
    wave = torch.sin(torch.arange(out.numel()).double()).view(out.shape)
    out.backward(wave)
    expected.backward(wave)
    assert error(mine.grad, theirs.grad) < 1e-8
    first = other.Head0 if name.startswith("seqresne") else other.Init
    assert error(model.stem[0].weight.grad, first.LinearLayer.weight.grad) < 1e-8
    statistics = export_published(model)
    for key, value in other.state_dict().items():
        assert error(statistics[key], value) < 1e-8, key


def test_initialisation_follows_the_published_code() -> None:
    torch.manual_seed(0)
    model = sct.SeqResNetB22()
    stage = model.stages[1]
    k = 64
    for weight, fan_out in ((stage.reduce_weight, k), (stage.tail_weight, 512 * 9), (model.stem[0].weight, 32 * 9)):
        bound = (6 / fan_out) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
    for j, weight in enumerate(stage.transform_weight.split(k)):
        bound = (6 / (9 * k)) ** 0.5
        if stage.plan.groups[j].residual_start is None:
            assert 0.99 * bound < weight.abs().max() <= bound
        else:
            assert weight.count_nonzero() == 0
    bound = (3 / 1000) ** 0.5
    assert 0.99 * bound < model.classifier.weight.abs().max() <= bound
    assert model.classifier.bias.count_nonzero() == 0


def test_fresh_blocks_are_the_identity() -> None:
    """Zero layers B: the raw features of the last block are those that entered the first."""
    stage = sct.Stage(sct.Plan.stage(8, 4, 2))
    x = torch.randn(2, 8, 5, 5)
    buffer = stage.run(x, keep_buffer=True).buffer
    assert torch.equal(buffer[:, -8:], x)


def test_timm_conventions() -> None:
    model = randomise(sct.CifarSeqResNet(4, 1, bottleneck=True)).eval()
    x = torch.randn(2, 3, 8, 8)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 48)
    assert [info["num_chs"] for info in model.feature_info] == [16, 32, 48]
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4]
    for info in model.feature_info:
        model.get_submodule(info["module"])
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, features)
    for info, feature in zip(model.feature_info, maps, strict=True):
        assert feature.shape == (2, info["num_chs"], 8 // info["reduction"], 8 // info["reduction"])
        assert feature.min() >= 0
    (only,) = model.forward_intermediates(x, [-1], intermediates_only=True)
    assert torch.equal(only, maps[-1])
    assert len(model.forward_intermediates(x, 2, intermediates_only=True)) == 2
    assert model.get_classifier() is model.classifier
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(features, pre_logits=True))


def test_feature_info_of_b42() -> None:
    model = sct.SeqResNetB42(device="meta")
    assert [(i["num_chs"], i["reduction"]) for i in model.feature_info] == [(128, 4), (256, 8), (512, 16), (1024, 32)]
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_state_survives_copying_and_saving(tmp_path: object) -> None:
    model = randomise(sct.CifarSeqResNet(4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    fresh = sct.CifarSeqResNet(4, 1).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_frozen_norms_use_running_statistics_while_training() -> None:
    model = randomise(sct.CifarSeqResNet(4, 1, dropout=0.0)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    x = torch.randn(2, 3, 8, 8)
    frozen = everything(model, x, run)
    assert torch.equal(frozen["output 0"], everything(model.eval(), x, run)["output 0"])
    assert all(torch.equal(frozen[name], value) for name, value in before.items())


def test_cumulative_average_of_statistics() -> None:
    """momentum None, as in BatchNorm: the running mean is that of all batches."""
    layer = sct.SeqConv2d(4, 4, 2, momentum=None)
    plain = nn.BatchNorm2d(2, momentum=None)
    for _ in range(3):
        x = torch.randn(2, 4, 5, 5)
        layer(x)
        plain(nn.functional.conv2d(x, layer.transform_weight[:2], padding=1))
    assert error(layer.norm.running_mean[:2], plain.running_mean) < 1e-5
    assert error(layer.norm.running_var[:2], plain.running_var) < 1e-5


def test_dropout_leaves_the_first_layer_and_downsizing_alone() -> None:
    model = sct.CifarSeqResNet(4, 1, dropout=0.5).train()
    first = model.stages[0]
    mask = first.draw_mask(torch.empty(64, 16, 1, 1))
    entry = first.plan.window_offsets[first.plan.entry_groups]
    windows = first.plan.window_offsets[-1]
    assert (mask[:, :entry] == 1).all() and (mask[:, windows:] == 1).all()
    assert set(mask[:, entry:windows].unique().tolist()) == {0.0, 2.0}
    last = model.stages[2]
    mask = last.draw_mask(torch.empty(64, 48, 1, 1))
    assert set(mask[:, last.plan.window_offsets[-1] :].unique().tolist()) == {0.0, 2.0}
    assert model.eval().stages[0].draw_mask(torch.empty(1, 16, 1, 1)) is None


BAD_INPUTS = {
    "channels": (lambda: torch.randn(2, 4, 8, 8), ValueError, r"x has 4 channels .* expected \[N, 3, H, W\]"),
    "rank": (lambda: torch.randn(3, 8, 8), ValueError, "x has 3 dimensions"),
    "integer": (lambda: torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8.*float32"),
    "no-pixels": (lambda: torch.randn(2, 3, 0, 8), ValueError, "at least 1"),
    "dtype": (lambda: torch.randn(2, 3, 8, 8).double(), TypeError, "float64.*float32.*autocast"),
    "device": (lambda: torch.empty(2, 3, 8, 8, device="meta"), ValueError, "meta.*cpu"),
    "no-tensor": (lambda: [1.0], TypeError, "x must be a tensor, not list"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_images(case: str) -> None:
    make, kind, message = BAD_INPUTS[case]
    with pytest.raises(kind, match=message):
        sct.CifarSeqResNet(4, 1)(make())
    with pytest.raises(kind, match=message.replace("but the model", "but reduce_weight").replace("cpu", "cpu")):
        sct.SeqConv2d(3, 4, 2)(make())


def test_bad_shortcut_and_single_value() -> None:
    layer = sct.SeqConv2d(4, 4, 2)
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match="shortcut has 3 channels"):
        layer.forward_raw(x, torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match="shortcut has shape"):
        layer.forward_raw(x, torch.randn(1, 4, 5, 5))
    with pytest.raises(ValueError, match="one value per channel"):
        layer(torch.randn(1, 4, 1, 1))
    assert layer.eval()(torch.randn(1, 4, 1, 1)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sct.create_model("seqresnet_b43"), "unknown model 'seqresnet_b43'; did you mean seqresnet_b42"),
        (lambda: sct.use_backend("attn"), "unknown backend 'attn'; did you mean 'aten'"),
        (lambda: sct.CifarSeqResNet(12, 4), r"out_channels \(64\) must be a multiple of group_width \(12\)"),
        (lambda: sct.CifarSeqResNet(8, 4, (1, 1)), "blocks"),
        (lambda: sct.CifarSeqResNet(8, 0), "widen"),
        (lambda: sct.SeqConv2d(4, 4, 2, dropout=1.0), "dropout"),
        (lambda: sct.SeqConv2d(4, 4, 2, eps=0.0), r"eps \(0.0\) must be above 0"),
        (lambda: sct.SeqResNetB22(num_classes=-1, device="meta"), "num_classes"),
        *(
            (
                lambda i=i: sct.CifarSeqResNet(4, 1).forward_intermediates(torch.empty(1, 3, 8, 8), i),
                "indices .*stages 0 to 2",
            )
            for i in (4, 0, -1, [3], [-4], [0.5], [])
        ),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_stages_by_any_integers() -> None:
    numbers = torch.tensor([0, -1, 1]).numpy()
    for indices, found in ((2, [1, 2]), (numbers, [0, 2, 1]), (numbers[2], [2])):
        assert chosen_stages(indices, 3) == found
    for wrong in (1.0, Ellipsis):
        with pytest.raises(TypeError, match="indices must be an int, several, or None, not"):
            chosen_stages(wrong, 3)


def test_an_adapter_around_the_first_conv() -> None:
    """As low-rank adapters and observers stand there."""
    model, x = sct.CifarSeqResNet(4, 1).eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    model.stem[0] = nn.Sequential(model.stem[0])
    assert torch.equal(model(x), expected)
    model = randomise(small_imagenet()).eval()
    model.stem[0] = nn.Sequential(nn.Conv2d(4, 3, 1), model.stem[0])
    x = torch.randn(2, 4, 40, 40)
    for options in ({}, {"plain": True}):
        fused = sct.fuse(model, **options)
        assert error(fused(x), model(x)) < 1e-4 and torch.equal(fused(x), fused.train()(x))
        assert not any("running" in name for name in fused.state_dict())


@pytest.mark.parametrize("make", [small_imagenet, partial(sct.CifarSeqResNet, 4, 1)], ids=["imagenet", "cifar"])
@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_features_are_laid_out_as_the_images(
    make: Callable[..., nn.Module], in_chans: int, channels_last: bool
) -> None:
    """As a ResNet's are, so that `.view(n, -1)` behind them works for contiguous images."""
    model = randomise(make(in_chans=in_chans)).eval()
    expected = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, in_chans, 64, 64).clone(memory_format=expected)
    for network in (model, sct.fuse(model), sct.fuse(model, plain=True)):
        last, features = network.forward_intermediates(x)
        for out in (network.forward_features(x), last, *features):
            assert out.is_contiguous(memory_format=expected)
            assert channels_last or out.view(2, -1).shape[1] == out[0].numel()


def test_registry() -> None:
    assert "seqresnet_b42" in sct.list_models()
    assert sct.list_models("seqresnet_b*") == ["seqresnet_b22", "seqresnet_b42"]
    assert isinstance(sct.create_model("seqresnet_b22", device="meta", num_classes=3), sct.SeqResNetB22)

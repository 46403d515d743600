"""The models under timm: the checks that timm makes of its own, on small relatives and on the registered names.

Full-size networks run on the meta device, where shapes are real; numbers are checked on a small ImageNet network and on
the CIFAR networks.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import error, randomise
from timm_networks import SMALL, needs_timm, shrink
from torch import nn

import seqconv_triton as sct

NAMES = sct.list_models()


def test_core_does_not_import_timm_and_the_error_names_the_extra() -> None:
    code = """
import sys, seqconv_triton
assert "timm" not in sys.modules
sys.modules["timm"] = None  # as if it were missing
try:
    import seqconv_triton.interop.timm
except ImportError as error:
    assert "seqconv-triton[timm]" in str(error), error
else:
    raise AssertionError("imported without timm")
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


def test_core_stops_early() -> None:
    """Without timm: what lies behind the last chosen stage is not computed, and that stage's features are the last."""
    model = randomise(sct.CifarSeqResNet(8, 1)).train()
    x = torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.stages[2].state_dict())
    last, (first, second) = model.forward_intermediates(x, [0, 1], stop_early=True)
    assert last is second and [first.shape[2], second.shape[2]] == [8, 4]
    assert all(torch.equal(value, before[name]) for name, value in model.stages[2].state_dict().items())
    model.eval()
    _, maps = model.forward_intermediates(x)
    assert torch.equal(model.forward_intermediates(x, [-2], stop_early=True)[0], maps[1])


@needs_timm
@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_fits_the_model(name: str, timm: ModuleType) -> None:
    """Registered; configuration consistent with features, pooling, classifier and first conv; headless variants."""
    assert timm.is_model(name) and name in timm.list_models(name)
    model = timm.create_model(name, device="meta").eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg is model.pretrained_cfg and cfg["architecture"] == name
    assert cfg["first_conv"] + ".weight" in state and cfg["classifier"] + ".weight" in state
    assert model.num_classes == cfg["num_classes"] and model.in_chans == cfg["input_size"][0]
    assert list(state) == list(sct.create_model(name, device="meta").state_dict())
    x = torch.empty(1, *cfg["input_size"], device="meta")
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model(x).shape == (1, cfg["num_classes"])
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(7, "catavgmax")
    assert model(x).shape == (1, 7) and model.head_hidden_size == 2 * model.num_features
    assert model.get_classifier() is model.classifier and model.get_classifier(name_only=True) == "classifier"
    assert timm.create_model(name, num_classes=0, device="meta").eval()(x).shape == (1, model.num_features)
    headless = timm.create_model(name, num_classes=0, global_pool="", device="meta").eval()
    assert headless(x).shape == features.shape
    assert timm.data.resolve_model_data_config(model)["input_size"] == cfg["input_size"]


@needs_timm
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("in_chans", [3, 1])
def test_forward_and_backward(name: str, in_chans: int, timm: ModuleType) -> None:
    """As the core's model bit for bit, and every parameter has a gradient."""
    shrink()
    model = randomise(timm.create_model(name, num_classes=42, in_chans=in_chans), layer_b=0.1)
    x = torch.randn(2, in_chans, 32, 32)
    out = model.eval()(x)
    assert out.shape == (2, 42) and out.isfinite().all()
    if name != "seqresnet_b22":  # that one is shrunk
        core = sct.create_model(name, num_classes=42, in_chans=in_chans).eval()
        core.load_state_dict(model.state_dict())
        assert error(out, core(x)) < 1e-6
    model.train()(x).mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@needs_timm
@pytest.mark.parametrize("name", SMALL)
def test_features(name: str, timm: ModuleType) -> None:
    """features_only equals forward_intermediates of the whole model, all channels and reductions as announced."""
    shrink()
    whole = randomise(timm.create_model(name), layer_b=0.1).eval()
    x = torch.randn(2, 3, 32, 32)
    last, maps = whole.forward_intermediates(x)
    assert torch.equal(last, whole.forward_features(x))
    info = timm.models.FeatureInfo(copy.deepcopy(whole.feature_info), range(len(maps)))
    assert len(maps) == len(info.channels()) >= 3
    for channels, reduction, feature in zip(info.channels(), info.reduction(), maps, strict=True):
        assert feature.shape == (2, channels, 32 // reduction, 32 // reduction) and feature.min() >= 0
    for indices in (None, (1,), (0, 2), (-1,), 2):
        chosen = [maps[i] for i in (range(len(maps)) if indices is None else range(-2, 0) if indices == 2 else indices)]
        options = {} if indices is None else {"out_indices": indices}
        features = timm.create_model(name, features_only=True, **options)
        missing, extra = features.model.load_state_dict(shortened(whole.state_dict(), features.model), strict=False)
        assert not missing and not extra
        for got, expected in zip(features.eval()(x), chosen, strict=True):
            assert error(got, expected) < 1e-6
        assert features.feature_info.channels() == [feature.shape[1] for feature in chosen]
        early, taken = whole.forward_intermediates(x, indices, stop_early=True)
        assert all(torch.equal(a, b) for a, b in zip(taken, chosen, strict=True))
        assert early.shape[2] == min(feature.shape[2] for feature in chosen)
        loss = sum(feature.mean() for feature in features.train()(x))
        loss.backward()
        assert not [name for name, p in features.named_parameters() if p.grad is None or not p.grad.any()]


def shortened(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The part of a whole network's state that a network pruned to its features holds: the first groups."""
    return {name: state[name].flatten()[: t.numel()].view(t.shape) for name, t in model.state_dict().items()}


@needs_timm
def test_norm_and_checkpointing_of_features(timm: ModuleType) -> None:
    """With `norm` the last stage's features are the network's; a features_only network trains with checkpointing."""
    shrink()
    model = randomise(timm.create_model("seqresnet_b22", drop_rate=0.5), layer_b=0.1).eval()
    x = torch.randn(2, 3, 32, 32)
    last, maps = model.forward_intermediates(x, [3, 1], norm=True)
    assert torch.equal(maps[0], last) and torch.equal(last, model.forward_features(x))
    plain = model.forward_intermediates(x, [3, 1], intermediates_only=True)
    assert torch.equal(maps[1], plain[1]) and error(plain[0], last) > 0.1
    (only,) = model.forward_intermediates(x, [-1], norm=True, stop_early=True, intermediates_only=True)
    assert torch.equal(only, last)
    gradients = []
    features = randomise(timm.create_model("seqresnet_b22", features_only=True), layer_b=0.1).double().train()
    for enable in (False, True):
        twin = copy.deepcopy(features)
        twin.model.set_grad_checkpointing(enable)
        sum(feature.square().mean() for feature in twin(x.double())).backward()
        gradients.append([p.grad for p in twin.parameters()])
    assert all(error(b, a) < 1e-9 for a, b in zip(*gradients, strict=True))


@needs_timm
def test_traced_by_fx(timm: ModuleType) -> None:
    """Dropout in front of the classifier follows the trace's mode."""
    model = randomise(timm.create_model("cifar_seqresnet_r4_k8", drop_rate=0.5)).eval()
    x = torch.randn(2, 3, 16, 16)
    traced = torch.fx.symbolic_trace(model)
    assert error(traced(x), model(x)) < 1e-6 and set(traced.state_dict()) == set(model.state_dict())
    traced.head_drop.train()
    assert error(traced(x), model(x)) > 0.1
    model.reset_classifier(0, "")
    model.reset_classifier(4)
    assert model.pool_type == "avg" and model(x).shape == (2, 4)
    maps = torch.fx.symbolic_trace(timm.create_model("cifar_seqresnet_r4_k8", features_only=True))
    assert [m.shape[1] for m in maps(x)] == [64, 128, 192]


def test_table_of_timms_own_tests() -> None:
    """docs/timm.md holds a whole run, in which nothing failed but TorchScript."""
    from facilities import END
    from timm_suite import DOCUMENT, FOR_ANY, REFUSED, START

    table = DOCUMENT.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    rows = re.findall(r"^\| `(\w+)`.* \| (\d+) \| (\d+) \| (\d+) \|$", table, re.MULTILINE)
    assert {*FOR_ANY, *REFUSED, "test_model_forward_fx", "test_model_backward_fx"} <= {name for name, *_ in rows}
    for name, *counts in rows:
        assert [int(n) for n in counts] == ([0, len(NAMES), 0] if name in REFUSED else [len(NAMES), 0, 0]), name


@needs_timm
@pytest.mark.parametrize("indices", [1, (0,), (1, 2)], ids=str)
def test_pruning_keeps_the_weights(indices: object, timm: ModuleType) -> None:
    shrink()
    model = randomise(timm.create_model("seqresnet_b22"), layer_b=0.1).eval()
    model.stages[0].requires_grad_(False)
    model.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32)
    expected = model.forward_intermediates(x, indices, intermediates_only=True)
    kept = model.prune_intermediate_layers(indices, prune_norm=True)
    assert kept == ([3] if indices == 1 else list(indices))
    assert len(model.stages) == max(kept) + 1
    last, got = model.forward_intermediates(x, kept)
    assert all(error(a, b) < 1e-6 for a, b in zip(got, expected, strict=True))
    assert torch.equal(last, got[-1]) and torch.equal(model(x), got[-1])
    assert not any(p.requires_grad for p in model.stages[0].parameters())
    assert error(sct.fuse(model)(x), got[-1]) < 1e-5
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), got[-1]) < 1e-5
    assert model.stages[-1].recompute and model.stages[-1].tail_weight is None
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


def frozen(stage: nn.Module) -> None:
    from timm.layers import freeze_batch_norm_2d

    stage.norm, stage.reduce_norm = freeze_batch_norm_2d(stage.norm), freeze_batch_norm_2d(stage.reduce_norm)


def without_affine(stage: nn.Module) -> None:
    for norm in (stage.norm, stage.reduce_norm):
        norm.weight = norm.bias = None


def other_momenta(stage: nn.Module) -> None:
    stage.norm.momentum, stage.reduce_norm.momentum = 0.5, None


BNS = {
    "synchronised": sct.convert_sync_batchnorm,
    "evaluating": lambda stage: [norm.eval() for norm in (stage.norm, stage.reduce_norm)],
    "frozen": frozen,
    "without-affine": without_affine,
    "other-momenta": other_momenta,
}


@needs_timm
@pytest.mark.parametrize("case", BNS)
def test_pruning_keeps_the_bns(case: str, timm: ModuleType) -> None:
    """Kind, mode, attributes and hooks of a stage that is shortened; features and statistics as in the whole."""
    shrink()
    model = randomise(timm.create_model("seqresnet_b22"), layer_b=0.1).double()
    BNS[case](model.stages[1])
    whole, calls = copy.deepcopy(model), []
    stage = model.stages[1]
    stage.tag = "mine"
    stage.register_forward_hook(lambda *_: calls.append("stage"))
    model.prune_intermediate_layers([1])
    model.stages[1].norm.register_forward_hook(lambda *_: calls.append("norm"))
    assert model.stages[1].tag == "mine" and not stage.norm._forward_hooks
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        features = [m.forward_intermediates(x, [1], intermediates_only=True)[0] for m in (model, whole)]
        assert error(*features) < 1e-10
    assert calls == ["norm", "stage"] * 2
    for name in ("norm", "reduce_norm"):
        short, long = (getattr(m.stages[1], name) for m in (model, whole))
        assert type(short) is type(long) and short.training == long.training
        for key, value in short.state_dict().items():
            assert error(value, long.state_dict()[key][: len(value)] if value.dim() else long.state_dict()[key]) < 1e-10
        for attribute in ("momentum", "eps", "process_group"):
            assert getattr(short, attribute, 0) == getattr(long, attribute, 0)


@needs_timm
def test_what_cannot_be_pruned(timm: ModuleType) -> None:
    model = timm.create_model("cifar_seqresnet_r4_k8")
    with pytest.raises(ValueError, match=r"indices \(5\)"):
        model.prune_intermediate_layers(5)
    with pytest.raises(ValueError, match="prune before folding"):
        sct.fuse(model).prune_intermediate_layers([0])
    torch.nn.utils.prune.identity(model.stages[0], "transform_weight")
    with pytest.raises(ValueError, match=r"transform_weight is computed .* cannot be shortened"):
        model.prune_intermediate_layers([0])


@needs_timm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "mean"}, "global_pool.*'avg'"),
        ({"global_pool": ""}, r"global_pool \(''\).*num_classes=0"),
        ({"drop_rate": 1.5}, "drop_rate"),
        ({"num_classes": -1}, "num_classes"),
        ({"features_only": True, "feature_cls": "hook"}, "feature_cls.*getter"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(reversed(value)),
)
def test_bad_options(options: dict[str, object], message: str, timm: ModuleType) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("cifar_seqresnet_r4_k8", **options)
    with pytest.raises(ValueError, match="output_fmt"):
        timm.create_model("cifar_seqresnet_r4_k8").forward_intermediates(torch.empty(1, 3, 8, 8), output_fmt="NLC")

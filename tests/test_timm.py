"""The models under timm: the checks that timm makes of its own, on small relatives and on the registered names.

Full-size networks run on the meta device, where shapes are real; numbers are checked on a small ImageNet network and on
the CIFAR networks.
"""

from __future__ import annotations

import copy
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import error, python_blocks, randomise
from torch import nn

import seqconv_triton as sct
from seqconv_triton.models.imagenet import StageRow


def have_timm() -> str | None:
    """Why timm cannot be used here, or None: a torchvision beside another build of torch raises RuntimeError."""
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as problem:
        return f"timm: {problem}"
    return None


MISSING = have_timm()
needs_timm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


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


@pytest.fixture
def timm() -> Iterator[ModuleType]:
    """timm with our models, and with a small ImageNet network under seqresnet_b22's name."""
    import timm

    import seqconv_triton.interop.timm as ours
    from seqconv_triton.interop.timm_network import TimmSeqResNetB22

    rows = TimmSeqResNetB22.rows
    yield timm
    TimmSeqResNetB22.rows = rows
    assert ours.__all__


def shrink() -> None:
    from seqconv_triton.interop.timm_network import TimmSeqResNetB22

    shapes = ((8, 4, 1, 1), (16, 8, 1, 1), (32, 8, 2, 2), (64, 16, 1, 1))
    TimmSeqResNetB22.rows = tuple(StageRow(*shape) for shape in shapes)


NAMES = sct.list_models()
SMALL = ("seqresnet_b22", "cifar_seqresnet_r4_k8", "cifar_seqresnet_b_r7_k16")


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


@needs_timm
def test_weights(timm: ModuleType, tmp_path: Path) -> None:
    """None are shipped; one's own load, also under the published names, with other images and classes."""
    for options in ({}, {"pretrained_cfg_overlay": {"num_classes": 10}}):
        with pytest.raises(
            RuntimeError, match=r"no weights are shipped for cifar_seqresnet_r4_k8.*pretrained_cfg_overlay"
        ):
            timm.create_model("cifar_seqresnet_r4_k8", pretrained=True, **options)
    assert not timm.list_models("*seqresne?_*", pretrained=True)
    model = randomise(sct.create_model("cifar_seqresnet_r4_k8"), layer_b=0.1).eval()
    x = torch.randn(2, 3, 16, 16)
    for file, state in (("own.pt", model.state_dict()), ("published.pt", sct.export_published(model))):
        torch.save(state, tmp_path / file)
        overlay = {"file": str(tmp_path / file)}
        loaded = timm.create_model("cifar_seqresnet_r4_k8", pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert error(loaded(x), model(x)) < 1e-6
    overlay = {"file": str(tmp_path / "own.pt")}
    other = timm.create_model(
        "cifar_seqresnet_r4_k8", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=4
    )
    assert other(x[:, :1]).shape == (2, 4)
    assert error(other.stem[0].weight, model.stem[0].weight.sum(1, keepdim=True)) < 1e-6
    direct = timm.create_model("cifar_seqresnet_r4_k8", checkpoint_path=str(tmp_path / "own.pt")).eval()
    assert error(direct(x), model(x)) < 1e-6


@needs_timm
def test_training_tools(timm: ModuleType) -> None:
    """Layer-wise rates, weight decay, dropout in front of the classifier, checkpointing, a step of timm's optimizer."""
    shrink()
    model = timm.create_model("seqresnet_b22", num_classes=3, drop_rate=0.5).train()
    from timm.models import group_parameters
    from timm.optim import create_optimizer_v2

    groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    names = {name for name, _ in model.named_parameters()}
    assert set(groups) == names
    assert groups["stem.0.weight"] < groups["stages.0.norm.weight"] < groups["stages.3.norm.weight"]
    assert groups["stages.3.norm.weight"] < groups["classifier.weight"]
    assert model.no_weight_decay() == set()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, param_group_fn=lambda m: sct.parameter_groups(m, 1e-4))
    flat = model.stem[4].reduce_weight
    assert flat.dim() == 1 and any(flat is p for p in optimizer.param_groups[0]["params"])
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4
    model.set_grad_checkpointing()
    features = torch.rand(2, 64, 2, 2)
    torch.manual_seed(3)
    pooled = model.forward_head(features, pre_logits=True)
    assert 0 < (pooled == 0).float().mean() < 1
    before = flat.detach().clone()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(flat, before)
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), features.mean((2, 3)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    assert error(compiled(x), model(x)) < 1e-5


@needs_timm
def test_documentation_runs() -> None:
    """Every Python block of docs/timm.md."""
    for code in python_blocks("timm.md"):
        exec(code, {})


@needs_timm
def test_an_epoch_as_in_timms_training_script(timm: ModuleType, tmp_path: Path) -> None:
    """Its dataset, loader, loss, optimizer, scheduler and EMA, on images that tell their class by their brightness."""
    from PIL import Image
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    for i in range(32):
        folder = tmp_path / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (i % 2 * 200 + i,) * 3).save(folder / f"{i}.png")
    model = timm.create_model("cifar_seqresnet_b_r7_k16", num_classes=2, drop_rate=0.1)
    config = resolve_data_config({}, model=model)
    loader = create_loader(
        create_dataset("", root=str(tmp_path)), config["input_size"], batch_size=8, is_training=False, num_workers=0,
        use_prefetcher=False, persistent_workers=False, mean=config["mean"], std=config["std"],
        crop_pct=config["crop_pct"], interpolation=config["interpolation"],
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, "sgd", lr=0.02, momentum=0.9)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=3)
    ema, loss_function, losses = ModelEmaV3(model, decay=0.5), LabelSmoothingCrossEntropy(0.1), []
    for epoch in range(epochs):
        for images, target in loader:
            loss = loss_function(model.train()(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert ema.module.eval()(images).shape == (8, 2)


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

"""`fuse`: BN folded into weights and affines, the same function, its own state."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import error, randomise, small_imagenet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import seqconv_triton as sct
from seqconv_triton.plan import Plan

facility = pytest.mark.facility

MODELS = {
    "b22": (lambda: sct.SeqResNetB22(num_classes=7, dtype=torch.float64), 64),
    "cifar": (lambda: sct.CifarSeqResNet(4, 2, dropout=0.2, dtype=torch.float64), 9),
    "cifar-bottleneck-dense": (lambda: sct.CifarSeqResNet(4, 2, bottleneck=True, windowed=False).double(), 9),
    "subgroups-repeated": (lambda: sct.SeqResNeXt24(num_classes=7, repeat_extension=True, dtype=torch.float64), 32),
}


@facility("sct.fuse: BN folded, state saved and loaded")
@pytest.mark.parametrize("case", MODELS)
def test_fused_model_is_the_same_function(case: str) -> None:
    make, size = MODELS[case]
    model = randomise(make(), layer_b=0.1)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    fused = sct.fuse(model)
    assert model.training and not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    expected = model.eval()(x)
    for backend in ("aten", "reference"):
        with sct.use_backend(backend), torch.no_grad():
            assert error(fused(x), expected) < 1e-12
            assert error(fused.train()(x), expected) < 1e-12
    features, expected_features = (m.forward_intermediates(x, intermediates_only=True) for m in (fused, model))
    for got, wanted in zip(features, expected_features, strict=True):
        assert error(got, wanted) < 1e-12
    loaded = sct.fuse(make())
    loaded.load_state_dict(fused.state_dict())
    assert torch.equal(loaded(x), fused(x))
    assert not any("running" in name for name in fused.state_dict())


@facility("sct.fuse: BN folded, state saved and loaded")
def test_fused_model_runs_here(place: torch.device) -> None:
    model = randomise(sct.CifarSeqResNet(16, 1, bottleneck=True, device=place)).eval()
    x = torch.randn(2, 3, 4, 4, device=place)
    with sct.use_backend("reference"):
        expected = model.double()(x.double())
    assert error(sct.fuse(model.float())(x), expected) < 1e-5


def test_folded_layers_are_not_trained() -> None:
    """Their scales are in the weights already: a step in one of them alone would be another function."""
    fused, x = sct.fuse(randomise(sct.CifarSeqResNet(4, 1, bottleneck=True))), torch.randn(2, 3, 8, 8)
    assert not any(p.requires_grad for p in fused.stages.parameters())
    with torch.no_grad():
        expected = fused(x)
    out = fused(x)
    assert error(out, expected) < 1e-5
    out.sum().backward()  # the classifier may be
    assert fused.classifier.weight.grad is not None
    fused.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"folded layer .* is not for training"):
        fused(x)
    with torch.no_grad():
        fused(x)


@facility("sct.fuse: BN folded, state saved and loaded")
def test_fused_model_compiles_in_one_graph() -> None:
    """Also the stem, whose conv has a bias then."""
    model = sct.fuse(randomise(sct.SeqResNetB22(num_classes=7)))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert error(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-5


@pytest.mark.parametrize("pack", [True, False])
def test_compiled_models_follow_their_weights(pack: bool) -> None:
    """Whether packed or not; what is packed is found again through a compiled graph."""
    torch._dynamo.reset()
    fused, x = (
        sct.fuse(randomise(sct.Stage(Plan.stage(32, 16, 1, entry_channels=16))), pack=pack),
        torch.randn(2, 16, 7, 9),
    )
    compiled = torch.compile(fused, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            with sct.use_backend("reference"):
                expected = fused(x)
            assert error(compiled(x), expected) < 1e-5
            if pack:
                fused.transform_weight.mul_(1.5)
            else:
                fused.transform_weight.data.mul_(1.5)


def test_gradients_of_a_fused_model() -> None:
    """Saliency maps of a deployed model: the input's gradient is the same function's."""
    model = randomise(sct.CifarSeqResNet(4, 1, bottleneck=True, dtype=torch.float64)).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (sct.fuse(model), model)]
    assert error(*gradients) < 1e-12


@pytest.mark.parametrize("options", [{}, {"bottleneck": True, "subgroups": 2}], ids=["basic", "bottleneck"])
def test_layer_keeps_room_for_a_shortcut(options: dict[str, object]) -> None:
    layer = randomise(sct.SeqConv2d(6, 8, 4, dtype=torch.float64, **options)).eval()
    x, shortcut = torch.randn(2, 6, 5, 5).double(), torch.randn(2, 8, 5, 5).double()
    fused = sct.fuse(nn.Sequential(layer))[0]

    def outputs(module: sct.SeqConv2d) -> list[Tensor]:
        with torch.no_grad():
            return [*module.forward_raw(x, shortcut), *module.forward_raw(x), module(x)]

    for got, expected in zip(outputs(fused), outputs(layer), strict=True):
        assert error(got, expected) < 1e-12


def test_what_cannot_be_folded() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, not int"):
        sct.fuse(3)
    with pytest.raises(ValueError, match="no seqconv_triton layers"):
        sct.fuse(nn.Linear(2, 2))
    fused = sct.fuse(sct.CifarSeqResNet(4, 1))
    with pytest.raises(ValueError, match="folded already"):
        sct.fuse(fused)
    with pytest.raises(ValueError, match="folded"):
        sct.export_published(fused)
    model = sct.CifarSeqResNet(4, 1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    with pytest.raises(ValueError, match="without running statistics"):
        sct.fuse(model)


def test_computed_weights_are_refused() -> None:
    """What is folded into a weight that is computed anew would be lost."""
    for change in (
        lambda stage: parametrizations.weight_norm(stage, "transform_weight"),
        lambda stage: prune.l1_unstructured(stage, "transform_weight", 0.5),
    ):
        model = randomise(sct.CifarSeqResNet(4, 1)).eval()
        change(model.stages[0])
        with pytest.raises(ValueError, match=r"stages\.0: transform_weight is computed"):
            sct.fuse(model)
    prune.remove(model.stages[0], "transform_weight")
    x = torch.randn(2, 3, 8, 8)
    assert error(sct.fuse(model)(x), model(x)) < 1e-5
    users_own = parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    assert sct.fuse(nn.Sequential(users_own, sct.SeqConv2d(3, 4, 4)))[1].training is False
    prune.l1_unstructured(model.classifier, "weight", 0.5)  # such a weight cannot be copied, whoever's it is
    with pytest.raises(ValueError, match=r"classifier: weight is computed .* cannot be copied"):
        sct.fuse(model)


HOOKED = {
    "last-bn": (lambda model: model.norm, False, "norm: a BatchNorm2d"),
    "stem-bn": (lambda model: model.stem[1], False, r"stem\.1: a BatchNorm2d"),
    "stem-conv": (lambda model: model.stem[0], False, r"stem\.0: a StemConv2d"),
    "stage-bn": (lambda model: model.stages[0].reduce_norm, False, r"stages\.0\.reduce_norm: a BatchNorm2d"),
    "stage": (lambda model: model.stages[0], True, r"stages\.0: a Stage"),
    "second-conv": (lambda model: model.stem[3], True, r"stem\.3: a StemConv2d"),
    "adapted-conv": (lambda model: model.stem[0][1], True, r"stem\.0\.1: a StemConv2d"),
}


@pytest.mark.parametrize("case", HOOKED)
def test_no_hook_is_lost(case: str) -> None:
    """On a module that would be gone it is an error; elsewhere it goes along."""
    find, only_plain, message = HOOKED[case]
    model, x = randomise(small_imagenet()).eval(), torch.randn(2, 3, 40, 40)
    if case == "adapted-conv":
        model.stem[0] = nn.Sequential(nn.Conv2d(3, 3, 1), model.stem[0])
    handle = find(model).register_forward_hook(lambda _, args, out: out * 2 if only_plain else None)
    for options in ({"plain": True},) if only_plain else ({}, {"plain": True}, {"pack": True}):
        with pytest.raises(ValueError, match=message + " that would be gone has hooks"):
            sct.fuse(model, **options)
    if only_plain:
        assert error(sct.fuse(model)(x), model(x)) < 1e-4
    handle.remove()
    model.stages.register_forward_hook(lambda *_: None)
    model.stem[2].register_forward_hook(lambda _, args, out: out * 2)
    model.classifier.register_forward_hook(lambda _, args, out: out + 1)
    assert error(sct.fuse(model, plain=True)(x), model(x)) < 1e-4


def test_bns_of_the_stem_that_cannot_be_folded() -> None:
    class Clamped(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(-1, 1)

    for place in (lambda model: model.stem, lambda model: model):
        model = small_imagenet()
        where = place(model)
        name = "1" if where is model.stem else "norm"
        channels = getattr(where, name).num_features
        setattr(where, name, Clamped(channels))
        with pytest.raises(TypeError, match=r"(stem\.1|norm) is a Clamped, which computes otherwise"):
            sct.fuse(model)
        setattr(where, name, nn.BatchNorm2d(channels, track_running_stats=False))
        with pytest.raises(ValueError, match=r"(stem\.1|norm): a BN without running statistics"):
            sct.fuse(model)


class AlwaysInTraining(nn.BatchNorm2d):
    """Test-time adaptation: the batch's statistics in evaluation, too."""

    def train(self, mode: bool = True) -> AlwaysInTraining:
        return super().train(True)


@pytest.mark.parametrize("name", ["norm", "stem.1", "stages.0.norm"])
def test_bns_that_stay_in_training_are_refused(name: str) -> None:
    model = small_imagenet()
    model.set_submodule(name, AlwaysInTraining(model.get_submodule(name).num_features))
    with pytest.raises(ValueError, match=r"norm: a|stem\.1: a") as caught:
        sct.fuse(model)
    assert "AlwaysInTraining that eval() leaves in training mode" in str(caught.value)


class Standardised(nn.Conv2d):
    """As timm's StdConv2d: its weight is not what it computes with."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.flatten(1).std(1)[:, None, None, None], None, self.stride, 1)


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"plain": True}], ids=str)
def test_a_stems_conv_of_another_kind_keeps_its_weight(options: dict[str, bool]) -> None:
    model = small_imagenet()
    first = model.stem[0]
    model.stem[0] = Standardised(first.in_channels, first.out_channels, 3, first.stride, 1, bias=False)
    model, x = randomise(model, layer_b=0.3).double().eval(), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    assert error(sct.fuse(model, **options)(x), model(x)) < 1e-10


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"plain": True}], ids=str)
def test_nothing_of_ours_trains_in_a_fused_network(options: dict[str, bool]) -> None:
    for network in (small_imagenet(), sct.CifarSeqResNet(4, 1)):
        trained = [name for name, p in sct.fuse(network, **options).named_parameters() if p.requires_grad]
        assert trained == ["classifier.weight", "classifier.bias"]


def test_files_of_a_fused_model(tmp_path: Path) -> None:
    fused, x = sct.fuse(randomise(sct.CifarSeqResNet(4, 1))), torch.randn(2, 3, 8, 8)
    torch.save(fused.state_dict(), tmp_path / "state.pt")
    torch.save(fused, tmp_path / "model.pt")
    loaded = sct.fuse(sct.CifarSeqResNet(4, 1))
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for twin in (loaded, torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(fused)):
        assert torch.equal(twin(x), fused(x))


def test_layers_that_share_weights_but_not_bns() -> None:
    """Each is folded into weights of its own; those of a module outside stay as they are."""
    first, second = (randomise(sct.Stage(Plan.stage(8, 4, 1), dtype=torch.float64), seed) for seed in (0, 1))
    second.reduce_weight, second.transform_weight = first.reduce_weight, first.transform_weight
    model = nn.Sequential(first, second).eval()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert error(sct.fuse(model)(x), model(x)) < 1e-12

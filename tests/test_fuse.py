"""`fuse`: BN folded into weights and affines, the same function, its own state."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from helpers import error, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import seqconv_triton as sct
from seqconv_triton.backend.aten import packed as aten_packed
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


@pytest.mark.parametrize(
    "block", [{}, {"bottleneck": False}, {"subgroups": 2}], ids=["bottleneck", "basic", "subgroups"]
)
def test_packed_weights_follow_the_weights(block: dict[str, object]) -> None:
    """On a CPU weights are packed at the first evaluation: changes, other sizes and copies must not meet old ones."""
    fused = sct.fuse(randomise(sct.Stage(Plan.stage(32, 16, 1, entry_channels=16, **block), dtype=torch.float32)))

    def check(model: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            got = model(x)
            with sct.use_backend("reference"):
                assert error(got, copy.deepcopy(model).double()(x.double())) < 1e-5
            assert torch.equal(model(x), got)

    x = torch.randn(2, 16, 7, 9)
    check(fused, x)
    check(fused, torch.randn(1, 16, 12, 5))
    for name, weight in fused.named_parameters():
        if name.endswith("norm.weight"):  # folded: ones, by which nothing is multiplied again
            continue
        with torch.no_grad():
            weight.add_(torch.randn_like(weight), alpha=0.1)
            changed = fused(x)
        check(fused, x)
        weight.data = weight.data * 1.5
        check(fused, x)
        with torch.no_grad():
            assert not torch.equal(fused(x), changed), name
    check(copy.deepcopy(fused), x)
    state = {name: value if "norm.weight" in name else value * 0.9 for name, value in fused.state_dict().items()}
    fused.load_state_dict(state)
    check(fused, x)
    state = {name: value if "norm.weight" in name else value * 0.9 for name, value in state.items()}
    fused.load_state_dict(state, assign=True)
    check(fused, x)
    with torch.no_grad():
        expected = fused(x)
    with torch.inference_mode():
        assert torch.equal(fused(x), expected)


def test_nan_stays_nan_in_packed_weights() -> None:
    fused, x = small_fused(), torch.randn(2, 16, 7, 9)
    x[1] = torch.nan
    with torch.no_grad():
        out = fused(x)
    assert out[0].isfinite().all() and out[1].isnan().all()


def small_fused() -> nn.Module:
    return sct.fuse(randomise(sct.Stage(Plan.stage(32, 16, 1, entry_channels=16))))


def test_packed_weights_know_weights_apart_that_lay_in_the_same_place() -> None:
    """Temporary weights, those of functional_call, get the ids and the memory of those before them."""
    seen = []
    for _ in range(20):
        weight = torch.ones(1000)
        identity = aten_packed.identity(weight)
        assert identity not in seen
        seen.append(identity)
        del weight
    assert len({identity[1:] for identity in seen}) < 20


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_packed_weights_follow_fused_optimizers(optimizer: type[torch.optim.Optimizer]) -> None:
    """They change weights without PyTorch's count of changes."""
    fused, x = small_fused(), torch.randn(2, 16, 7, 9)
    weights = [fused.reduce_weight, fused.transform_weight]
    with torch.no_grad():
        before = fused(x)
    fused(x).square().mean().backward()
    optimizer(weights, lr=0.1, fused=True).step()
    with torch.no_grad(), sct.use_backend("reference"):
        expected = fused(x)
    with torch.no_grad():
        assert error(fused(x), expected) < 1e-5 and error(before, expected) > 1e-3


def test_packed_weights_can_be_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch swaps no weight that somebody refers to weakly."""
    fused, x = small_fused(), torch.randn(2, 16, 7, 9)
    with torch.no_grad():
        expected = fused(x)
        monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        assert error(fused.double()(x.double()), expected) < 1e-5


def test_packed_weights_die_with_the_model() -> None:
    gc.collect()
    before = len(aten_packed._remembered)
    fused = sct.fuse(randomise(sct.Stage(Plan.stage(32, 16, 1))))
    with torch.no_grad():
        fused(torch.randn(2, 32, 7, 9))
    assert len(aten_packed._remembered) == before + (1 if torch.backends.mkldnn.is_available() else 0)
    del fused
    gc.collect()
    assert len(aten_packed._remembered) == before


@facility("sct.fuse: BN folded, state saved and loaded")
def test_fused_model_compiles_in_one_graph() -> None:
    """Also the stem, whose conv has a bias then."""
    model = sct.fuse(randomise(sct.SeqResNetB22(num_classes=7)))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert error(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-5


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

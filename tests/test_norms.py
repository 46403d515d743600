"""What stands in a BN's place behaves as there: every attribute of BatchNorm2d, frozen BNs, and clear errors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from frozen import AlwaysInEvaluation, FrozenModule, FrozenSubclass, FrozenWithAffine, replace
from helpers import error, randomise, small_imagenet
from plain import assert_alike, pair
from torch import Tensor, nn

import seqconv_triton as sct

facility = pytest.mark.facility
LAYERS = {"basic": {}, "bottleneck": {"bottleneck": True}}


def set_to(**attributes: object) -> Callable[[nn.Module], None]:
    def change(norm: nn.Module) -> None:
        for name, value in attributes.items():
            setattr(norm, name, value)

    return change


def back(norm: nn.Module) -> None:
    norm.running_mean, norm.running_var = torch.zeros(norm.num_features), torch.ones(norm.num_features)
    norm.to(norm.weight.dtype)


NO_STATISTICS = {"running_mean": None, "running_var": None}
# id: what happens to every BN between the first steps, and between the last.
CHANGES: dict[str, list[Callable[[nn.Module], object]]] = {
    "untouched": [],
    "track_running_stats-off": [set_to(track_running_stats=False)],
    "track_running_stats-off-and-on": [set_to(track_running_stats=False), set_to(track_running_stats=True)],
    "momentum": [set_to(momentum=0.5), set_to(momentum=0.0)],
    "momentum-1": [set_to(momentum=1.0)],
    "momentum-int": [set_to(momentum=0), set_to(momentum=1)],
    "momentum-none": [set_to(momentum=None)],
    "momentum-none-and-back": [set_to(momentum=None), set_to(momentum=0.25)],
    "no-counter": [set_to(num_batches_tracked=None)],
    "no-counter-no-momentum": [set_to(num_batches_tracked=None, momentum=None)],
    "no-statistics": [set_to(**NO_STATISTICS)],
    "no-statistics-nor-tracking": [set_to(**NO_STATISTICS, track_running_stats=False, num_batches_tracked=None)],
    "no-statistics-and-back": [set_to(**NO_STATISTICS), back],
    "no-affine": [set_to(weight=None, bias=None)],
    "no-bias": [set_to(bias=None)],
    "no-weight": [set_to(weight=None)],
    "eps": [set_to(eps=0.3)],
    "frozen": [lambda norm: norm.eval()],
    "frozen-and-back": [lambda norm: norm.eval(), lambda norm: norm.train()],
    "frozen-without-statistics": [set_to(**NO_STATISTICS), lambda norm: norm.eval()],
    "reset_running_stats": [lambda norm: norm.reset_running_stats()],
    "reset_parameters": [lambda norm: norm.reset_parameters()],
}


def containers(layer: sct.SeqConv2d) -> list[nn.Module]:
    return [norm for norm in (layer.norm, layer.reduce_norm) if norm is not None]


@facility("Every attribute of BatchNorm2d, set at any time: as in conv-BN-ReLU of PyTorch's own modules")
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", CHANGES)
def test_attributes(case: str, kind: str, backend: str) -> None:
    layer, plain = pair(**LAYERS[kind])
    with sct.use_backend(backend):
        assert_alike(layer, plain)
        for change in CHANGES[case]:
            for norm in [*containers(layer), *(norm for _, norm in plain.bn_modules())]:
                change(norm)
            for _ in range(2):
                assert_alike(layer, plain)
        for module in (layer, plain):
            module.eval()
        assert_alike(layer, plain)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_a_bn_of_the_users_in_its_place(options: dict[str, object]) -> None:
    layer, plain = pair(bottleneck=True)

    def make(norm: nn.Module) -> nn.Module:
        return nn.BatchNorm2d(norm.num_features, dtype=torch.float64, **options)

    layer.norm, layer.reduce_norm = make(layer.norm), make(layer.reduce_norm)
    plain.replace(make)
    for training in (True, True, False):
        layer.train(training), plain.train(training)
        assert_alike(layer, plain)


def test_attributes_under_torch_compile() -> None:
    torch._dynamo.reset()
    layer, plain = pair(bottleneck=True)
    layer.compile(fullgraph=True, backend="aot_eager")
    for change in (set_to(), set_to(track_running_stats=False), set_to(momentum=0.5, track_running_stats=True)):
        for norm in [*containers(layer), *(norm for _, norm in plain.bn_modules())]:
            change(norm)
        assert_alike(layer, plain)


class Keeping(FrozenModule):
    """Computes its scale once, and holds what cannot be copied."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        self.scale, self.lock = None, threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = self.weight * (self.running_var + self.eps).rsqrt()
        return (x - self.running_mean[:, None, None]) * self.scale[:, None, None] + self.bias[:, None, None]


FROZEN = [FrozenModule, FrozenWithAffine, FrozenSubclass, AlwaysInEvaluation]


@facility("Frozen BNs of any make (weight, bias, running_mean, running_var, eps): fixed in train() too")
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("make", FROZEN)
def test_frozen(make: type[nn.Module], kind: str, backend: str) -> None:
    layer, plain = pair(**LAYERS[kind])
    layer.norm = make(layer.norm)
    layer.reduce_norm = None if layer.reduce_norm is None else make(layer.reduce_norm)
    plain.replace(make)
    with sct.use_backend(backend):
        for training in (True, True, False):
            layer.train(training), plain.train(training)
            assert_alike(layer, plain)
    folded = sct.fuse(layer)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        assert error(folded(x), plain(x)) < 1e-10


@pytest.mark.parametrize("make", FROZEN)
def test_a_frozen_network_trains_as_it_evaluates(make: type[nn.Module]) -> None:
    """Stem, stages, and the features between them; compiled, too."""
    model = replace(randomise(small_imagenet(), layer_b=0.3).double(), make)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    evaluated, features = model.eval()(x), model.forward_intermediates(x, intermediates_only=True)
    state = copy.deepcopy(model.state_dict())
    assert torch.equal(model.train()(x), evaluated)
    for got, expected in zip(model.forward_intermediates(x, intermediates_only=True), features, strict=True):
        assert torch.equal(got, expected)
    torch._dynamo.reset()
    assert error(torch.compile(model, fullgraph=True, backend="aot_eager")(x), evaluated) < 1e-10
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert error(sct.fuse(model)(x), evaluated) < 1e-10


def test_frozen_whatever_its_values_are() -> None:
    """Whether one is frozen says its class, not what is in it: garbage at first, or means far above deviations."""
    layer, plain = pair()
    layer.norm = FrozenWithAffine(layer.norm)
    plain.replace(FrozenWithAffine)
    state = {name: value.clone() for name, value in layer.norm.state_dict().items()}
    for value in layer.norm.state_dict().values():
        value.fill_(torch.nan)
    layer(torch.randn(2, 6, 4, 4, dtype=torch.float64))
    layer.norm.load_state_dict(state)
    assert_alike(layer, plain)
    far = sct.SeqConv2d(6, 12, 4)
    far.norm.running_mean.fill_(1e4)
    far.norm = FrozenModule(far.norm)
    assert far(torch.randn(2, 6, 4, 4)).isfinite().all()
    kept, plain = pair()
    kept.norm = Keeping(kept.norm)
    kept.norm(torch.randn(2, 12, 4, 4, dtype=torch.float64))
    plain.replace(FrozenModule)
    assert_alike(kept, plain)
    computed = {name: value * 1 for name, value in layer.named_parameters()}
    fresh, _ = pair()
    fresh.norm = FrozenWithAffine(fresh.norm)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    torch.func.functional_call(fresh, computed, (x,)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_forward_put_in_the_place_of_batch_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever wants all BNs of a process to compute otherwise."""
    layer, _ = pair()
    monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: 2 * x)
    with pytest.raises(TypeError, match="norm is a BatchNorm2d, which computes otherwise"):
        layer(torch.randn(2, 6, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("make", [FrozenModule, FrozenSubclass, lambda norm: norm.eval()])
def test_statistics_are_not_trained(make: Callable[[nn.Module], nn.Module]) -> None:
    layer = sct.SeqConv2d(6, 12, 4)
    layer.norm = make(layer.norm)
    layer.norm.running_var.requires_grad_()
    x = torch.randn(2, 6, 4, 4)
    with pytest.raises(ValueError, match=r"norm\.running_var requires a gradient"):
        layer(x)
    with torch.no_grad():
        assert layer(x).isfinite().all()


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("make", [FrozenModule, FrozenSubclass, AlwaysInEvaluation])
def test_frozen_where_tensors_have_no_values(make: Callable[[nn.Module], nn.Module], strict: bool) -> None:
    """Exported, in either mode, before it has ever run; and on the meta device."""
    layer = replace(randomise(sct.SeqConv2d(6, 12, 4, bottleneck=True)), make)
    x = torch.randn(2, 6, 4, 4)
    program = torch.export.export(layer, (x,), strict=strict)
    assert error(program.module()(x), layer(x)) < 1e-6
    assert layer.to("meta")(x.to("meta")).shape == (2, 12, 4, 4)
    with torch.device("meta"):
        assert replace(sct.SeqConv2d(6, 12, 4), make)(torch.empty(2, 6, 4, 4)).shape == (2, 12, 4, 4)


def test_statistics_come_in_pairs() -> None:
    layer = sct.SeqConv2d(6, 12, 4)
    layer.norm.running_var = None
    with pytest.raises(ValueError, match="norm has running_mean or running_var alone"):
        layer(torch.randn(2, 6, 4, 4))


def test_pruned_bn_weights_follow() -> None:
    """Pruning makes the weight anew in a hook before the BN's forward, which a stage does not call."""
    layer, plain = pair()
    mask = torch.ones(12, dtype=torch.float64)
    mask[[1, 5, 10]] = 0
    nn.utils.prune.custom_from_mask(layer.norm, "weight", mask)
    for i, norm in enumerate(plain.norms):
        nn.utils.prune.custom_from_mask(norm, "weight", mask[4 * i : 4 * i + 4])
    with torch.no_grad():
        layer.norm.weight_orig.mul_(2)
        for norm in plain.norms:
            norm.weight_orig.mul_(2)
        x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
        assert error(layer(x), plain(x)) < 1e-10

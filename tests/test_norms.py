"""What stands in a BN's place behaves as there: every attribute of BatchNorm2d, frozen BNs, and clear errors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from enum import Enum

import pytest
import torch
from helpers import error, randomise, small_imagenet
from plain import VECTORS, PlainLayer
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


def assert_alike(layer: sct.SeqConv2d, plain: PlainLayer, tolerance: float = 1e-10) -> None:
    """One pass forward and backward: outputs, gradients, and all that the BNs hold afterwards."""
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), plain(x)
    assert error(out, expected) < tolerance
    wave = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    weights = [norm.weight for _, norm in plain.bn_modules() if isinstance(getattr(norm, "weight", None), nn.Parameter)]
    got = torch.autograd.grad(out, [x, layer.transform_weight], wave)
    wanted = torch.autograd.grad(expected, [x, *(conv.weight for conv in plain.transform), *weights], wave)
    groups = len(plain.transform)
    assert error(got[0], wanted[0]) < tolerance
    assert error(got[1], torch.cat(wanted[1 : 1 + groups])) < tolerance
    for which in ("norm", "reduce_norm") if plain.plan.bottleneck else ("norm",):
        for vector in VECTORS:
            found, value = getattr(getattr(layer, which), vector, None), plain.vector(which, vector)
            assert (found is None) == (value is None), (which, vector)
            assert found is None or error(found, value) < tolerance, (which, vector)


def pair(kind: str) -> tuple[sct.SeqConv2d, PlainLayer]:
    layer = randomise(sct.SeqConv2d(6, 12, 4, dtype=torch.float64, **LAYERS[kind]))
    return layer, PlainLayer(layer)


def containers(layer: sct.SeqConv2d) -> list[nn.Module]:
    return [norm for norm in (layer.norm, layer.reduce_norm) if norm is not None]


@facility("Every attribute of BatchNorm2d, set at any time: as in conv-BN-ReLU of PyTorch's own modules")
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", CHANGES)
def test_attributes(case: str, kind: str, backend: str) -> None:
    layer, plain = pair(kind)
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
    layer, plain = pair("bottleneck")

    def make(norm: nn.Module) -> nn.Module:
        return nn.BatchNorm2d(norm.num_features, dtype=torch.float64, **options)

    layer.norm, layer.reduce_norm = make(layer.norm), make(layer.reduce_norm)
    plain.replace(make)
    for training in (True, True, False):
        layer.train(training), plain.train(training)
        assert_alike(layer, plain)


def test_attributes_under_torch_compile() -> None:
    torch._dynamo.reset()
    layer, plain = pair("bottleneck")
    layer.compile(fullgraph=True, backend="aot_eager")
    for change in (set_to(), set_to(track_running_stats=False), set_to(momentum=0.5, track_running_stats=True)):
        for norm in [*containers(layer), *(norm for _, norm in plain.bn_modules())]:
            change(norm)
        assert_alike(layer, plain)


class FrozenModule(nn.Module):
    """As torchvision's FrozenBatchNorm2d and its relatives: buffers, and a forward of its own."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for vector in VECTORS[:4]:
            self.register_buffer(vector, getattr(norm, vector).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class FrozenWithAffine(FrozenModule):
    """Statistics fixed, weight and bias trained."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        for vector in ("weight", "bias"):
            value = self._buffers.pop(vector)
            self.register_parameter(vector, nn.Parameter(value))


class FrozenSubclass(nn.BatchNorm2d):
    """A BatchNorm2d whose forward never looks at the batch."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, dtype=norm.weight.dtype)
        self.load_state_dict(norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class AlwaysInEvaluation(nn.BatchNorm2d):
    """The other way people freeze: a train() that does nothing."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, dtype=norm.weight.dtype)
        self.load_state_dict(norm.state_dict())
        self.train()

    def train(self, mode: bool = True) -> AlwaysInEvaluation:
        return super().train(False)


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
    layer, plain = pair(kind)
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


def replace(module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make(child))
        else:
            replace(child, make)
    return module


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
    layer, plain = pair("basic")
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
    kept, plain = pair("basic")
    kept.norm = Keeping(kept.norm)
    kept.norm(torch.randn(2, 12, 4, 4, dtype=torch.float64))
    plain.replace(FrozenModule)
    assert_alike(kept, plain)
    computed = {name: value * 1 for name, value in layer.named_parameters()}
    fresh, _ = pair("basic")
    fresh.norm = FrozenWithAffine(fresh.norm)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    torch.func.functional_call(fresh, computed, (x,)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


class Freezable(FrozenSubclass):
    """Frozen or not as a flag says, which is its own or its class's."""

    frozen = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.frozen else nn.BatchNorm2d.forward(self, x)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_frozen_by_a_flag_follows_it(compiled: bool) -> None:
    layer, plain = pair("bottleneck")
    layer.norm, layer.reduce_norm = Freezable(layer.norm), Freezable(layer.reduce_norm)
    plain.replace(Freezable)
    torch._dynamo.reset()
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    for frozen in (True, False, True):
        for norm in (layer.norm, layer.reduce_norm):
            norm.frozen = frozen
        if frozen:
            assert error(run(x), plain(x)) < 1e-10
        else:
            with pytest.raises(Exception, match="norm is a Freezable, which computes otherwise than BatchNorm2d does"):
                run(x)


class Mode(Enum):
    TRAINED = 0
    FROZEN = 1


class ByMode(FrozenSubclass):
    mode = Mode.FROZEN

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.mode is Mode.FROZEN else nn.BatchNorm2d.forward(self, x)


def test_what_is_frozen_by_a_mode_follows_it() -> None:
    layer, plain = pair("basic")
    layer.norm = ByMode(layer.norm)
    plain.replace(ByMode)
    assert_alike(layer, plain)
    layer.norm.mode = Mode.TRAINED
    with pytest.raises(TypeError, match="norm is a ByMode, which computes otherwise"):
        layer(torch.randn(2, 6, 4, 5, dtype=torch.float64))


def test_numbers_that_change_do_not_compile_again() -> None:
    """As a schedule of momentum makes them."""
    layer, plain = pair("basic")
    layer.norm = FrozenSubclass(layer.norm)
    plain.replace(FrozenSubclass)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled, x = torch.compile(layer, fullgraph=True, backend=keep), torch.randn(2, 6, 4, 5, dtype=torch.float64)
    for epoch in range(6):
        layer.norm.momentum = 0.5**epoch
        assert error(compiled(x), plain(x)) < 1e-10
    assert len(graphs) <= 2


def test_a_flag_of_the_class_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = pair("basic")
    layer.norm = Freezable(layer.norm)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    layer(x)
    monkeypatch.setattr(Freezable, "frozen", False)
    with pytest.raises(TypeError, match="norm is a Freezable"):
        layer(x)


def test_frozen_without_eps() -> None:
    """As torchvision's overwrite_eps leaves them for detectors with weights of old."""
    layer, plain = pair("bottleneck")
    for module in (layer, plain):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = 0.0
    layer.norm, layer.reduce_norm = FrozenModule(layer.norm), FrozenModule(layer.reduce_norm)
    plain.replace(FrozenModule)
    assert_alike(layer, plain)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    assert error(sct.fuse(layer)(x), plain(x)) < 1e-10


def test_a_forward_put_in_the_place_of_batch_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever wants all BNs of a process to compute otherwise."""
    layer, _ = pair("basic")
    monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: 2 * x)
    with pytest.raises(TypeError, match="norm is a BatchNorm2d, which computes otherwise"):
        layer(torch.randn(2, 6, 4, 5, dtype=torch.float64))


class SplitBatchNorm(nn.BatchNorm2d):
    """As timm's: the first images have one BN, the others another."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features)
        self.other = nn.BatchNorm2d(norm.num_features)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, rest = x.chunk(2)
        return torch.cat([super().forward(first), self.other(rest)])


class OwnStatistics(nn.Module):
    """Has all that a frozen BN has, and takes the batch's statistics."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for vector in VECTORS[:4]:
            self.register_buffer(vector, getattr(norm, vector).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


OTHERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "GroupNorm": lambda norm: nn.GroupNorm(2, norm.num_features),
    "LayerNorm": lambda norm: nn.LayerNorm(norm.num_features),
    "InstanceNorm2d": lambda norm: nn.InstanceNorm2d(norm.num_features, affine=True, track_running_stats=True),
    "Identity": lambda norm: nn.Identity(),
    "SplitBatchNorm": SplitBatchNorm,
    "OwnStatistics": OwnStatistics,
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_bn_is_refused_by_name(other: str, kind: str, training: bool) -> None:
    layer = replace(sct.SeqConv2d(6, 12, 4, **LAYERS[kind]), OTHERS[other]).train(training)
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match=rf"norm is a {other}, which .*plain convs"):
        layer(torch.randn(2, 6, 4, 4))
    with pytest.raises(TypeError, match=f"norm is a {other}"):
        sct.fuse(layer)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_statistics_come_in_pairs() -> None:
    layer = sct.SeqConv2d(6, 12, 4)
    layer.norm.running_var = None
    with pytest.raises(ValueError, match="norm has running_mean or running_var alone"):
        layer(torch.randn(2, 6, 4, 4))


def test_pruned_bn_weights_follow() -> None:
    """Pruning makes the weight anew in a hook before the BN's forward, which a stage does not call."""
    layer, plain = pair("basic")
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

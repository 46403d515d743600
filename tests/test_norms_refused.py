"""What stands in a BN's place and is none: an error that names it, in any precision and without values too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from frozen import FrozenModule, FrozenSubclass, replace
from torch import Tensor, nn

import seqconv_triton as sct

LAYERS = {"basic": {}, "bottleneck": {"bottleneck": True}}


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


class OwnStatistics(FrozenModule):
    """Has all that a frozen BN has, and takes the batch's statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


class MovingStatistics(FrozenSubclass):
    """Computes with its running statistics, and then moves them: no frozen BN."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training:
            self.running_mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return out


class ReplacedStatistics(FrozenSubclass):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean((0, 2, 3))
        return out


class OwnForward(FrozenSubclass):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x)


def by_batch(norm: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)


class WhereItIsTrained(FrozenSubclass):
    """Frozen where its weight needs no gradient, as Keras has it."""

    def forward(self, x: Tensor) -> Tensor:
        return by_batch(self, x) if self.weight.requires_grad else super().forward(x)


class WhereGradientsAre(FrozenSubclass):
    def forward(self, x: Tensor) -> Tensor:
        return by_batch(self, x) if torch.is_grad_enabled() else super().forward(x)


class WhereImagesNeedGradients(FrozenSubclass):
    def forward(self, x: Tensor) -> Tensor:
        return by_batch(self, x) if x.requires_grad else super().forward(x)


class WhereImagesAreLarge(FrozenSubclass):
    def forward(self, x: Tensor) -> Tensor:
        return by_batch(self, x) if x.shape[2:].numel() > 8 else super().forward(x)


class ConstantWeight(FrozenSubclass):
    """Its weight and bias have no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.detach(), self.bias.detach()
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)


class NoGradient(FrozenSubclass):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class CollectsMeans(FrozenModule):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        self.register_buffer("sum", torch.zeros_like(self.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.sum += x.detach().mean((0, 2, 3))
        return super().forward(x)


class CollectsImages(FrozenModule):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        self.images: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.images.append(x)
        return super().forward(x)


class CountsBatches(FrozenSubclass):
    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        return super().forward(x)


class Adapted(FrozenModule):
    """With a scale of its own to train, which changes nothing at first."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        self.scale = nn.Parameter(torch.ones_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale[:, None, None]


class Doubled(FrozenModule):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OfEachImage(FrozenModule):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.instance_norm(x))


class OfOneImage(FrozenSubclass):
    def forward(self, x: Tensor) -> Tensor:
        return by_batch(self, x) if x.shape[0] == 1 else super().forward(x)


class WithoutEps(FrozenModule):
    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.running_mean[:, None, None]) * self.running_var.rsqrt()[:, None, None]
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ClampedVariance(FrozenModule):
    def forward(self, x: Tensor) -> Tensor:
        var = self.running_var.clamp_min(1e-3)
        return nn.functional.batch_norm(x, self.running_mean, var, self.weight, self.bias, False, 0.0, self.eps)


class ClampedOutput(FrozenModule):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp_max(6)


class PositiveWeight(FrozenModule):
    """As InPlaceABN has it."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs() * (self.running_var + self.eps).rsqrt()
        return (x - self.running_mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


class UntilToldToTrain(FrozenSubclass):
    """Its train() freezes it, which nobody has called."""

    def train(self, mode: bool = True) -> UntilToldToTrain:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return by_batch(self, x) if self.training else super().forward(x)


OTHERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "GroupNorm": lambda norm: nn.GroupNorm(2, norm.num_features),
    "LayerNorm": lambda norm: nn.LayerNorm(norm.num_features),
    "InstanceNorm2d": lambda norm: nn.InstanceNorm2d(norm.num_features, affine=True, track_running_stats=True),
    "Identity": lambda norm: nn.Identity(),
    "SplitBatchNorm": SplitBatchNorm,
    "OwnStatistics": OwnStatistics,
    "OwnForward": OwnForward,
    "MovingStatistics": MovingStatistics,
    "ReplacedStatistics": ReplacedStatistics,
}
CLOSE = [
    WhereItIsTrained, WhereGradientsAre, WhereImagesNeedGradients, WhereImagesAreLarge, ConstantWeight, NoGradient,
    CollectsMeans, CollectsImages, CountsBatches, Adapted, Doubled, OfEachImage, OfOneImage, WithoutEps,
    ClampedVariance, ClampedOutput, PositiveWeight, UntilToldToTrain,
]  # fmt: skip


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


@pytest.mark.parametrize("kind", CLOSE)
def test_what_is_almost_frozen_is_refused_by_name(kind: type[nn.Module]) -> None:
    layer, x = sct.SeqConv2d(6, 12, 4, bottleneck=True), torch.randn(2, 6, 4, 4)
    for norm in (layer.norm, layer.reduce_norm):
        norm.running_var.mul_(torch.logspace(-5, 0, 12))
        norm.weight.data[::2] *= -1
    layer = replace(layer, kind)
    state = copy.deepcopy(layer.state_dict())
    for given in (x, x.clone().requires_grad_()):
        with pytest.raises(TypeError, match=f"norm is a {kind.__name__}"):
            layer(given)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert not getattr(layer.norm, "images", [])
    with pytest.raises(TypeError, match=f"norm is a {kind.__name__}"):
        torch.export.export(layer, (x,), strict=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", ["OwnStatistics", "OwnForward", "MovingStatistics"])
def test_what_is_no_bn_is_refused_in_half_precision(other: str, dtype: torch.dtype) -> None:
    layer = replace(sct.SeqConv2d(6, 12, 4), OTHERS[other]).to(dtype)
    with pytest.raises(TypeError, match=f"norm is a {other}"):
        layer(torch.randn(2, 6, 4, 4).to(dtype))


def test_no_module_at_all_is_refused_by_name() -> None:
    layer = sct.SeqConv2d(6, 12, 4)
    layer.norm = None
    with pytest.raises(TypeError, match="norm is a NoneType, which is no BN"):
        layer(torch.randn(2, 6, 4, 4))


@pytest.mark.parametrize("kind", [OwnForward, OwnStatistics, MovingStatistics, ReplacedStatistics])
def test_what_is_no_bn_is_refused_where_tensors_have_no_values(kind: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = replace(sct.SeqConv2d(6, 12, 4), kind), torch.randn(2, 6, 4, 4)
    with pytest.raises(Exception, match=f"norm is a {kind.__name__}"):
        torch.export.export(layer, (x,), strict=False)
    with pytest.raises(TypeError, match=f"norm is a {kind.__name__}"):
        layer.to("meta")(x.to("meta"))


def test_weights_of_zeros_tell_no_bn_from_another() -> None:
    """As they are where training starts from identity blocks."""
    layer = replace(sct.SeqConv2d(6, 12, 4), OwnStatistics)
    for vector, value in (("weight", 0.0), ("weight", 1e-9), ("running_var", 0.0)):
        layer.norm.get_buffer(vector).fill_(value)
        with pytest.raises(TypeError, match="norm is a OwnStatistics"):
            layer(torch.randn(2, 6, 4, 4))
    frozen = replace(sct.SeqConv2d(6, 12, 4), FrozenModule)
    frozen.norm.weight.data.zero_()
    frozen.norm.register_buffer("other", torch.full((3,), torch.nan))
    assert not frozen(torch.randn(2, 6, 4, 4)).any()


def test_a_lazy_bn_is_refused_by_name() -> None:
    layer = sct.SeqConv2d(6, 12, 4)
    layer.norm = nn.LazyBatchNorm2d()
    with pytest.raises(ValueError, match="norm is a LazyBatchNorm2d that does not know its channels yet"):
        layer(torch.randn(2, 6, 4, 4))

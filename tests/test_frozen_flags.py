"""BNs that are frozen or not as an attribute says: a stage follows it, and compiles no more than it must."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import pytest
import torch
from frozen import FrozenModule, FrozenSubclass
from helpers import error
from plain import assert_alike, pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import seqconv_triton as sct


class Freezable(FrozenSubclass):
    """Frozen or not as a flag says, which is its own or its class's."""

    frozen = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.frozen else nn.BatchNorm2d.forward(self, x)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_frozen_by_a_flag_follows_it(compiled: bool) -> None:
    layer, plain = pair(bottleneck=True)
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
    layer, plain = pair()
    layer.norm = ByMode(layer.norm)
    plain.replace(ByMode)
    assert_alike(layer, plain)
    layer.norm.mode = Mode.TRAINED
    with pytest.raises(TypeError, match="norm is a ByMode, which computes otherwise"):
        layer(torch.randn(2, 6, 4, 5, dtype=torch.float64))


def test_numbers_that_change_do_not_compile_again() -> None:
    """As a schedule of momentum makes them."""
    layer, plain = pair()
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
    layer, _ = pair()
    layer.norm = Freezable(layer.norm)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    layer(x)
    monkeypatch.setattr(Freezable, "frozen", False)
    with pytest.raises(TypeError, match="norm is a Freezable"):
        layer(x)


def test_frozen_without_eps() -> None:
    """As torchvision's overwrite_eps leaves them for detectors with weights of old."""
    try:
        nn.functional.batch_norm(torch.ones(1, 1), torch.zeros(1), torch.ones(1), eps=0.0)
    except ValueError as refusal:  # torch 2.11
        pytest.skip(f"this version of PyTorch has no BN without eps: {refusal}")
    layer, plain = pair(bottleneck=True)
    for module in (layer, plain):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = 0.0
    layer.norm, layer.reduce_norm = FrozenModule(layer.norm), FrozenModule(layer.reduce_norm)
    plain.replace(FrozenModule)
    assert_alike(layer, plain)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    assert error(sct.fuse(layer)(x), plain(x)) < 1e-10


class Blended(FrozenSubclass):
    """Running and batch statistics in parts, as test-time adaptation has them."""

    alpha = 1.0

    def forward(self, x: Tensor) -> Tensor:
        mean = self.alpha * self.running_mean + (1 - self.alpha) * x.detach().mean((0, 2, 3))
        return nn.functional.batch_norm(x, mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class ByBuffer(FrozenSubclass):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        self.register_buffer("frozen", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.frozen else nn.BatchNorm2d.forward(self, x)


class ByGradient(FrozenSubclass):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x) if self.weight.requires_grad else super().forward(x)


class Thawed(FrozenSubclass):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x)


class ByMomentum(FrozenSubclass):
    momentum = 0.0

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        self.momentum = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        with torch.no_grad():
            self.running_mean.lerp_(x.mean((0, 2, 3)), self.momentum)
        return out


class WithinTraining(FrozenSubclass):
    """The batch's statistics in evaluation alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else nn.functional.instance_norm(x)


class FixedEps(FrozenSubclass):
    def forward(self, x: Tensor) -> Tensor:
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        return nn.functional.batch_norm(x, *vectors, False, 0.0, 1e-5)


class Dropping(FrozenSubclass):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class Scaled(FrozenSubclass):
    """Computes its scale where it is made."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        self.register_buffer("scale", (self.weight * (self.running_var + self.eps).rsqrt()).detach())
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean[:, None, None]) * self.scale[:, None, None] + self.bias[:, None, None]


CHANGES: dict[str, tuple[type[FrozenSubclass], Callable[[nn.Module], object]]] = {
    "a-number": (Blended, lambda norm: setattr(norm, "alpha", 0.5)),
    "a-buffer": (ByBuffer, lambda norm: norm.frozen.fill_(False)),
    "what-is-trained": (ByGradient, lambda norm: norm.requires_grad_(True)),
    "momentum": (ByMomentum, lambda norm: setattr(norm, "momentum", 0.5)),
    "eps": (FixedEps, lambda norm: setattr(norm, "eps", 0.1)),
    "mode": (WithinTraining, lambda norm: norm.eval()),
    "a-module-inside": (Dropping, lambda norm: setattr(norm.drop, "p", 0.5)),
    "weights-behind-a-copy": (Scaled, lambda norm: norm.weight.mul_(2)),
    "its-class": (FrozenSubclass, lambda norm: setattr(norm, "__class__", Thawed)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_frozen_is_tried_again_when_it_changes(change: str) -> None:
    make, thaw = CHANGES[change]
    layer, plain = pair()
    layer.norm = make(layer.norm)
    plain.replace(make)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    for _ in range(2):
        assert error(layer(x), plain(x)) < 1e-10
    thaw(layer.norm)
    with pytest.raises(TypeError, match=r"norm is a \w+, which computes otherwise"):
        layer(x)


def test_what_is_frozen_is_tried_again_when_its_class_has_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = pair()
    layer.norm = Freezable(layer.norm)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    layer(x)
    monkeypatch.setattr(Freezable, "forward", Thawed.forward)
    with pytest.raises(TypeError, match="norm is a Freezable"):
        layer(x)


@torch.compile(backend="eager")
def compiled_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale[:, None, None] + shift[:, None, None]


class Compiled(FrozenModule):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return compiled_affine(x, scale, self.bias - self.running_mean * scale)


def test_what_is_frozen_may_compile_a_part_of_itself() -> None:
    """Under torch.compile, which lets one thread compile at a time."""
    layer, plain = pair()
    layer.norm = Compiled(layer.norm)
    plain.replace(FrozenModule)
    torch._dynamo.reset()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    assert error(torch.compile(layer, backend="eager")(x), plain(x)) < 1e-10


def test_what_is_frozen_is_tried_under_transforms() -> None:
    layer, plain = pair()
    layer.norm = FrozenSubclass(layer.norm)
    plain.replace(FrozenSubclass)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    with sct.use_backend("reference"):
        got = torch.func.grad(lambda x: layer(x).square().sum())(x)
    assert error(got, torch.func.grad(lambda x: plain(x).square().sum())(x)) < 1e-10


def test_what_is_frozen_is_tried_apart_from_what_goes_on() -> None:
    """Under checkpointing, vmap, inference_mode and autocast, on the first call."""
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)

    def fresh() -> tuple[sct.SeqConv2d, nn.Module]:
        layer, plain = pair()
        layer.norm = FrozenSubclass(layer.norm)
        plain.replace(FrozenSubclass)
        return layer, plain

    layer, plain = fresh()
    (got,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    assert error(got, expected) < 1e-10
    layer, plain = fresh()
    weights = torch.stack([layer.norm.weight.detach(), 2 * layer.norm.weight.detach()])
    with torch.no_grad():
        got = torch.vmap(lambda weight: torch.func.functional_call(layer, {"norm.weight": weight}, (x,)))(weights)
        assert error(got[0], plain(x)) < 1e-10
        for norm in plain.norms:
            norm.weight.mul_(2)
        assert error(got[1], plain(x)) < 1e-10
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        layer, plain = fresh()
        with mode:
            assert error(layer(x.detach()), plain(x.detach())) < 1e-10

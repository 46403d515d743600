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

"""`convert_sync_batchnorm` of BNs that are not simply BatchNorm2d; ranks are in test_parallel.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import error
from torch import Tensor, nn
from torch.nn.utils import prune

import seqconv_triton as sct

KINDS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, (4, 8)),
    "1d-sequence": (nn.BatchNorm1d, (4, 8, 5)),
    "2d": (nn.BatchNorm2d, (4, 8, 3, 3)),
    "3d": (nn.BatchNorm3d, (4, 8, 2, 3, 3)),
}


class Frozen(nn.BatchNorm2d):
    """The usual way to freeze: PyTorch's forward, and a train() that does nothing."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


class Slots(nn.BatchNorm2d):
    __slots__ = ("tag",)


@pytest.mark.parametrize("kind", KINDS)
def test_bns_of_any_dimension(kind: str) -> None:
    make, shape = KINDS[kind]
    model = nn.Sequential(make(8))
    twin = nn.Sequential(make(8))
    norm, parameters = model[0], list(model.parameters())
    assert sct.convert_sync_batchnorm(model) is model and model[0] is norm and isinstance(norm, make)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    x = torch.randn(shape)
    assert torch.equal(model(x), twin(x)) and torch.equal(norm.running_var, twin[0].running_var)
    with pytest.raises(ValueError, match="expected"):
        model(torch.randn(4, 8, 3, 3, 3, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_bns_of_any_dimension_over_ranks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of several ranks, on one: a world of this process alone."""
    make, shape = KINDS[kind]
    norm, twin = sct.convert_sync_batchnorm(make(8).double()), make(8).double()
    monkeypatch.setattr("seqconv_triton.nn.norm.group_name", lambda group: "alone")
    monkeypatch.setattr(torch.ops.seqconv_triton, "sum_over_ranks", lambda local, group: local)
    x = torch.randn(shape, dtype=torch.float64)
    assert error(norm(x), twin(x)) < 1e-10
    for vector in ("running_mean", "running_var", "num_batches_tracked"):
        assert error(getattr(norm, vector), getattr(twin, vector)) < 1e-10


class ActivatedBatchNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def replaced_forward() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(8)
    norm.forward = lambda x: x
    return norm


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "own-forward": (lambda: ActivatedBatchNorm(8), TypeError, "1 is a ActivatedBatchNorm with ways of its own"),
    "replaced-forward": (replaced_forward, TypeError, "1 is a BatchNorm2d with ways of its own"),
    "frozen": (lambda: Frozen(8), TypeError, "1 is a Frozen with ways of its own"),
    "slots": (lambda: Slots(8), TypeError, "1 is a Slots with ways of its own"),
    "pruned": (lambda: prune.identity(nn.BatchNorm2d(8), "weight"), ValueError, "1: weight is computed"),
    "lazy": (nn.LazyBatchNorm2d, ValueError, "1 is a LazyBatchNorm2d whose features are not known yet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_compute_something_else_is_refused(case: str) -> None:
    make, kind, message = REFUSED[case]
    model = nn.Sequential(nn.BatchNorm2d(8), make())
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(kind, match=message):
        sct.convert_sync_batchnorm(model)
    assert [type(module) for module in model.modules()] == kinds


def test_synchronised_already_with_a_forward_of_its_own() -> None:
    class Activated(nn.SyncBatchNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model = sct.convert_sync_batchnorm(nn.Sequential(Activated(8), nn.SyncBatchNorm(8)).eval())
    x = torch.randn(2, 8, 3, 3)
    assert type(model[0]) is Activated and type(model[1]) is not nn.SyncBatchNorm
    for shape in ((4, 8), (4, 8, 5), (4, 8, 2, 3), (4, 8, 2, 3, 4)):  # it takes any
        assert model[1](torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match="at least 2D"):
        model[1].train()(torch.randn(8))
    group = object()
    sct.convert_sync_batchnorm(model.eval(), group)
    assert model[1].process_group is group
    assert error(model(x), (x / (1 + 1e-5) ** 0.5).relu() / (1 + 1e-5) ** 0.5) < 1e-6


def test_hooks_and_shared_bns_stay() -> None:
    shared, calls = nn.BatchNorm2d(8), []
    shared.register_forward_hook(lambda *_: calls.append(1))
    model = sct.convert_sync_batchnorm(nn.ModuleDict({"one": shared, "other": nn.Sequential(shared)}))
    model["one"](torch.randn(2, 8, 3, 3))
    assert calls == [1] and model["one"] is model["other"][0]

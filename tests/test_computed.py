"""Weights that are computed from other tensors: they follow on every road, and are not written where that is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import error, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import seqconv_triton as sct

NAME = "transform_weight"
MAKERS: dict[str, Callable[[nn.Module], object]] = {
    "pruning": lambda stage: prune.l1_unstructured(stage, NAME, 0.5),
    "two-prunings": lambda stage: [prune.random_unstructured(stage, NAME, 0.3) for _ in range(2)],
    "weight-norm": lambda stage: weight_norm(stage, NAME),
    "spectral-norm": lambda stage: spectral_norm(stage, NAME),
    "parametrization": lambda stage: parametrizations.weight_norm(stage, NAME),
}
ignore = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


def changed(stage: nn.Module) -> None:
    """As a step or load_state_dict does it."""
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if NAME in name:
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) * parameter.std())


@ignore
@pytest.mark.parametrize("case", MAKERS)
def test_features_follow(case: str) -> None:
    """`forward_intermediates` and `forward_raw` call no module, but its weights are made as if they did."""
    model = randomise(sct.CifarSeqResNet(8, 1).double(), layer_b=0.3).eval()
    layer = randomise(sct.SeqConv2d(6, 12, 4, dtype=torch.float64)).eval()
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 6, 4, 4, dtype=torch.float64)

    def features() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return model.forward_intermediates(x, intermediates_only=True)[0], layer.forward_raw(y)[1]

    for module in (model.stages[0], layer):
        MAKERS[case](module)
    before = features()
    for module in (model.stages[0], layer):
        changed(module)
    after = features()
    assert all(error(a, b) > 0.1 for a, b in zip(before, after, strict=True))
    assert error(after[1], layer(y)) < (0.1 if case == "spectral-norm" else 1e-12)
    model(x)
    if case != "spectral-norm":  # which goes on with its power iteration at every call in training alone
        assert all(torch.equal(a, b) for a, b in zip(features(), after, strict=True))


@ignore
@pytest.mark.parametrize("case", [case for case in MAKERS if case != "parametrization"])
def test_two_steps_on_features(case: str) -> None:
    """The weight of the first step's graph is not used in the second's."""
    model = randomise(sct.CifarSeqResNet(8, 1), layer_b=0.3)
    MAKERS[case](model.stages[0])
    for _ in range(2):
        model.forward_intermediates(torch.randn(2, 3, 8, 8), intermediates_only=True)[0].sum().backward()
    assert all(p.grad is not None for name, p in model.stages[0].named_parameters() if NAME in name)


@ignore
@pytest.mark.parametrize("case", MAKERS)
def test_exports_follow(case: str) -> None:
    """What is exported is what the model would compute with, though nobody has called it since."""
    model, other = (sct.create_model("cifar_seqresnet_r4_k8").eval() for _ in range(2))
    for m in (model, other):
        MAKERS[case](m.stages[0])
    other.load_state_dict(randomise(model).state_dict())
    published = sct.export_published(other)
    other(torch.randn(1, 3, 8, 8))
    again = sct.export_published(other)
    assert all(error(value, again[name]) < 1e-5 for name, value in published.items())
    changed(other.stages[0])
    assert any(error(value, again[name]) > 0.1 for name, value in sct.export_published(other).items())


@ignore
@pytest.mark.parametrize("case", MAKERS)
def test_nothing_is_loaded_into_them(case: str) -> None:
    published = sct.export_published(randomise(sct.create_model("cifar_seqresnet_r4_k8")))
    model = sct.create_model("cifar_seqresnet_r4_k8")
    MAKERS[case](model.stages[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"stages\.1: transform_weight is computed .* cannot be loaded"):
        sct.load_published(model, published)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_loaded_where_there_is_no_memory() -> None:
    published = sct.export_published(sct.create_model("cifar_seqresnet_r4_k8"))
    model = sct.create_model("cifar_seqresnet_r4_k8", device="meta")
    with pytest.raises(ValueError, match="meta device: nothing there can be exported"):
        sct.export_published(model)
    with pytest.raises(ValueError, match=r"meta device.*to_empty"):
        sct.load_published(model, published)
    model = model.to_empty(device="cpu")
    sct.load_published(model, published)
    assert all(torch.equal(value, published[name]) for name, value in sct.export_published(model).items())

"""Where parameters start: deferred initialisation gives the constructor's, classifiers start near chance."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import error, randomise, small_imagenet
from torch import Tensor, nn

import seqconv_triton as sct

facility = pytest.mark.facility
MODELS = {
    "cifar": lambda **where: sct.CifarSeqResNet(8, 4, **where),
    "cifar-bottleneck": lambda **where: sct.CifarSeqResNet(8, 4, bottleneck=True, num_classes=100, **where),
    "imagenet": lambda **where: sct.create_model("seqresnet_b22", **where),
    "layer": lambda **where: sct.SeqConv2d(16, 64, 8, bottleneck=True, subgroups=2, **where),
}


@facility("Deferred initialisation: meta device, to_empty, reset_parameters of every module")
@pytest.mark.parametrize("case", MODELS)
def test_deferred_initialisation_is_the_constructors(case: str) -> None:
    """Uniform distributions are known by their bound; constants are equal."""
    expected = MODELS[case]().state_dict()
    model = MODELS[case](device="meta").to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, value in model.state_dict().items():
        if expected[name].is_floating_point() and expected[name].numel() > 1000:
            bound = expected[name].abs().max()
            assert error(value.abs().max(), bound) < 0.02, name
            zeros = [(tensor == 0).float().mean() for tensor in (value, expected[name])]
            assert abs(zeros[0] - zeros[1]) < 1e-3, name
        elif "stem" in name and name.endswith("weight") and value.dim() == 4:
            assert value.abs().max() <= math.sqrt(6 / (value.shape[0] * 9)), name
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("classes", [2, 10, 37])
def test_the_first_cross_entropy_is_that_of_chance(classes: int) -> None:
    """By the constructor for other numbers of classes than the paper's, and by `reset_classifier` for any."""
    labels = torch.arange(32) % classes
    x = torch.randn(32, 3, 32, 32)
    fresh = sct.SeqResNetB22(num_classes=classes)
    reset = sct.CifarSeqResNet(8, 4)
    reset.reset_classifier(classes)
    for model in (fresh, reset):
        assert type(model.classifier) is nn.Linear
        with torch.no_grad():
            assert nn.functional.cross_entropy(model(x), labels) < math.log(classes) + 0.3


def test_the_papers_classifiers_start_as_published() -> None:
    for model, classes in ((sct.SeqResNetB22(), 1000), (sct.CifarSeqResNet(8, 1), 10)):
        bound = math.sqrt(3 / classes)
        assert 0.95 * bound < model.classifier.weight.abs().max() <= bound
        assert model.classifier.bias.count_nonzero() == 0
    model = small_imagenet()
    assert type(model.classifier) is nn.Linear


def test_layer_sequential_unit_variance() -> None:
    """LSUV: a hook on every BN in turn, its output's deviation divided out of it; each hook sees what it has done."""
    model = randomise(small_imagenet(), layer_b=0.3)
    x = torch.randn(4, 3, 64, 64)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 2 * len(model.stages)

    def output(norm: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        hook = norm.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
        model(x)
        hook.remove()
        return seen[0]

    with torch.no_grad():
        for norm in norms:
            before = output(norm).std()
            norm.weight /= before
            norm.bias /= before
            assert abs(before - 1) > 1e-3 and abs(output(norm).std() - 1) < 1e-3

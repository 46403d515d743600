"""What a folded model exports: every conv with a weight and a bias that are constants, and the values of today."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import error, guided_gradient, randomise, small_imagenet
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.plan import Plan

facility = pytest.mark.facility

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "b22": lambda: sct.SeqResNetB22(num_classes=7),
    "seqresnext": lambda: sct.SeqResNeXt24(num_classes=7, repeat_extension=True),
    "small-imagenet": small_imagenet,
    "cifar": lambda: sct.CifarSeqResNet(16, 1),
    "cifar-bottleneck": lambda: sct.CifarSeqResNet(16, 1, bottleneck=True),
    "cifar-dense": lambda: sct.CifarSeqResNet(16, 1, bottleneck=True, windowed=False),
    "layer": lambda: nn.Sequential(sct.SeqConv2d(3, 12, 4, bottleneck=True, subgroups=2)),
}


def fused(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """The model, the folded one, images."""
    model = randomise(make(), layer_b=0.1).eval()
    return model, sct.fuse(model, plain=True), torch.randn(2, 3, 32, 32)


def conv_count(model: nn.Module) -> int:
    """As the plans have them, and the stem's."""
    stages = [m for m in model.modules() if isinstance(m, PackedSeqConv)]
    groups = sum(len(m.plan.groups) * (2 if m.plan.bottleneck else 1) + (m.plan.tail is not None) for m in stages)
    stem = model.stem if isinstance(model, sct.models.backbone.Backbone) else ()
    return groups + sum(isinstance(m, nn.Conv2d) for m in stem)


def assert_constants(program: torch.export.ExportedProgram, convs: int) -> None:
    """Nothing but a conv, a multiplication and an addition has seen a stage's parameters."""
    nodes = [node for node in program.graph.nodes if str(node.target).startswith("aten.conv")]
    assert len(nodes) == convs
    assert all(argument is None or argument.op == "placeholder" for node in nodes for argument in node.args[1:3])
    given = {spec.arg.name for spec in program.graph_signature.input_specs if spec.target and "stages" in spec.target}
    users = {str(user.target) for node in program.graph.nodes if node.name in given for user in node.users}
    assert users <= {"aten.conv2d.default", "aten.mul.Tensor", "aten.add.Tensor"}
    assert not any(word in str(node.target) for node in program.graph.nodes for word in ("split", "unbind", "permute"))


@facility("torch.export of sct.fuse(model, plain=True): a constant weight and bias of its own for every conv")
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("case", FAMILIES)
def test_every_conv_has_constants(case: str, strict: bool) -> None:
    model, folded, x = fused(FAMILIES[case])
    torch._dynamo.reset()
    program = torch.export.export(folded, (x,), strict=strict)
    assert_constants(program, conv_count(model))
    with torch.no_grad():
        assert error(program.module()(x), model(x)) < 1e-5
        assert error(folded(x), model(x)) < 1e-5


class Intermediates(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(x, intermediates_only=True)


def test_features_and_raw_outputs_have_constants() -> None:
    model, folded, x = fused(small_imagenet)
    program = torch.export.export(Intermediates(folded), (x,))
    # The last conv is not needed for the features; an exporter may leave it.
    assert_constants(program, conv_count(model))
    with torch.no_grad():
        for got, expected in zip(program.module()(x), Intermediates(model)(x), strict=True):
            assert error(got, expected) < 1e-5
    layer = randomise(sct.SeqConv2d(3, 8, 4)).eval()
    raw = nn.Sequential(layer)
    raw_fused = sct.fuse(raw, plain=True)[0]
    raw_fused.forward = raw_fused.forward_raw
    shortcut = torch.randn(2, 8, 32, 32)
    with torch.no_grad():
        program = torch.export.export(raw_fused, (x, shortcut))
        for got, expected in zip(program.module()(x, shortcut), layer.forward_raw(x, shortcut), strict=True):
            assert error(got, expected) < 1e-5


def test_weights_are_held_once(tmp_path: Path) -> None:
    """As many as in the packed model, in parameters, in the state dict and in an exported file."""
    model, folded, x = fused(FAMILIES["b22"])
    size = sum(tensor.nbytes for tensor in sct.fuse(model).state_dict().values())
    assert sum(tensor.nbytes for tensor in folded.state_dict().values()) <= size
    assert sum(parameter.nbytes for parameter in folded.parameters()) <= size
    torch.export.save(torch.export.export(folded, (x,)), tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").stat().st_size < 1.5 * size


@facility("sct.fuse(model, plain=True): ordinary modules, in the hands of copy, load_state_dict, to, functional_call")
def test_a_plain_model_is_as_any_other(tmp_path: Path) -> None:
    _, folded, x = fused(FAMILIES["cifar-bottleneck"])
    other = sct.fuse(randomise(sct.CifarSeqResNet(16, 1, bottleneck=True), seed=1), plain=True)
    with torch.no_grad():
        expected, before = folded(x), other(x)
        assert error(before, expected) > 0.1
        assert torch.equal(torch.func.functional_call(other, folded.state_dict(), (x,)), expected)
        assert torch.equal(other(x), before)
        other.load_state_dict(folded.state_dict())
        torch.save(folded, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        average = torch.optim.swa_utils.AveragedModel(folded)
        average.update_parameters(folded)
        for twin in (other, again, average, copy.deepcopy(folded), copy.deepcopy(folded).double().float()):
            assert error(twin(x), expected) < 1e-6
        conv = folded.stages[1].groups[3].transform
        conv.weight.data = conv.weight * 2  # whatever road: there is one weight
        changed = folded(x)
        assert error(changed, expected) > 1e-3
        assert error(torch.export.export(folded, (x,), strict=True).module()(x), changed) < 1e-5


def test_every_conv_is_in_a_trace() -> None:
    model, folded, x = fused(FAMILIES["cifar-bottleneck"])
    trace = torch.fx.symbolic_trace(folded)
    convs = [node for node in trace.graph.nodes if isinstance(dict(folded.named_modules()).get(node.target), nn.Conv2d)]
    assert len(convs) == conv_count(model)
    assert error(trace(x), folded(x)) < 1e-6


def test_a_layer_that_is_used_twice_is_one() -> None:
    layer = randomise(sct.SeqConv2d(8, 8, 4)).eval()
    model = nn.Sequential(layer, nn.Identity(), layer)
    folded, x = sct.fuse(model, plain=True), torch.randn(2, 8, 5, 5)
    assert folded[0] is folded[2]
    assert error(folded(x), model(x)) < 1e-5
    with pytest.raises(ValueError, match="pack and plain exclude one another"):
        sct.fuse(model, pack=True, plain=True)


def test_layer_of_a_folded_stage_alone() -> None:
    """A stage whose input is activated has no BN in front."""
    stage = randomise(sct.Stage(Plan.stage(16, 4, 1, entry_channels=8))).eval()
    folded, x = sct.fuse(nn.Sequential(stage), plain=True), torch.randn(2, 8, 9, 9)
    assert_constants(torch.export.export(folded, (x,)), conv_count(nn.Sequential(stage)))
    assert error(folded(x), stage(x)) < 1e-5


@facility("Guided backpropagation: every activation of sct.fuse(model, plain=True) is an nn.ReLU of its own")
@pytest.mark.parametrize("case", ["small-imagenet", "cifar-dense"])
def test_guided_backpropagation(case: str) -> None:
    model = randomise(FAMILIES[case](), layer_b=0.3).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    plain, calls = sct.fuse(model, plain=True), Counter[nn.Module]()
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda module, args: calls.update([module]))
            module.register_full_backward_hook(lambda module, given, arrived: (given[0].clamp_min(0),))
    (guided,) = torch.autograd.grad(plain(x)[:, 1].sum(), x)
    assert error(guided, guided_gradient(model, x, 1)) < 1e-10
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    assert error(gradient, guided) > 0.1
    assert set(calls.values()) == {1}

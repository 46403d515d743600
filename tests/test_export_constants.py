"""What a folded model exports: every conv with a weight and a bias that are constants, and the values of today."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import error, randomise, small_imagenet
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.plan import Plan

facility = pytest.mark.facility

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "b22": lambda: sct.SeqResNetB22(num_classes=7),
    "seqresnext": lambda: sct.SeqResNeXt24(num_classes=7, repeat_extension=True),
    "small-imagenet": small_imagenet,
    "cifar": lambda: sct.CifarSeqResNet(8, 1),
    "cifar-bottleneck": lambda: sct.CifarSeqResNet(8, 1, bottleneck=True),
    "cifar-dense": lambda: sct.CifarSeqResNet(8, 1, bottleneck=True, windowed=False),
    "layer": lambda: nn.Sequential(sct.SeqConv2d(3, 12, 4, bottleneck=True, subgroups=2)),
}


def fused(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """The model, the folded one, images."""
    model = randomise(make(), layer_b=0.1).eval()
    return model, sct.fuse(model), torch.randn(2, 3, 32, 32)


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
    users = Counter(
        str(user.target) for node in program.graph.nodes if "constants" in str(node.target) for user in node.users
    )
    assert set(users) <= {"aten.conv2d.default", "aten.mul.Tensor", "aten.add.Tensor"}
    assert not any(word in str(node.target) for node in program.graph.nodes for word in ("split", "unbind", "permute"))
    assert not any(spec.target and spec.target.endswith("_weight") for spec in program.graph_signature.input_specs)


@facility("torch.export of sct.fuse(model): a constant weight and bias of its own for every conv")
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("case", FAMILIES)
def test_every_conv_has_constants(case: str, strict: bool) -> None:
    model, folded, x = fused(FAMILIES[case])
    torch._dynamo.reset()
    program = torch.export.export(folded, (x,), strict=strict)
    assert_constants(program, conv_count(model))
    with torch.no_grad():
        assert error(program.module()(x), model(x)) < 1e-5
        assert error(folded(x), model(x)) < 1e-5  # the model itself is as it was


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
    raw_fused = sct.fuse(raw)[0]
    raw_fused.forward = raw_fused.forward_raw
    shortcut = torch.randn(2, 8, 32, 32)
    with torch.no_grad():
        program = torch.export.export(raw_fused, (x, shortcut))
        for got, expected in zip(program.module()(x, shortcut), layer.forward_raw(x, shortcut), strict=True):
            assert error(got, expected) < 1e-5


def storages(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_constants_take_no_memory(tmp_path: Path) -> None:
    """Nor does the exported file hold weights twice."""
    _, folded, x = fused(FAMILIES["b22"])
    state = folded.state_dict()
    for model in (folded, copy.deepcopy(folded), folded.to(torch.float64), folded.float()):
        held = [*model.parameters(), *model.buffers(), *model.state_dict().values()]
        assert storages(held) == storages(list(model.state_dict().values()))
    size = sum(tensor.nbytes for tensor in state.values())
    torch.export.save(torch.export.export(folded, (x,)), tmp_path / "model.pt2")
    assert size < (tmp_path / "model.pt2").stat().st_size < 1.5 * size


def moved(model: nn.Module, x: Tensor) -> nn.Module:
    return model.double().float()


def in_place(model: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith("norm.weight"):
                tensor.mul_(0.9)
    return model


def loaded(model: nn.Module, x: Tensor) -> nn.Module:
    other = copy.deepcopy(in_place(copy.deepcopy(model), x).state_dict())
    model.load_state_dict(other)
    return model


def assigned(model: nn.Module, x: Tensor) -> nn.Module:
    model.load_state_dict(loaded(copy.deepcopy(model), x).state_dict(), assign=True)
    return model


def replaced(model: nn.Module, x: Tensor) -> nn.Module:
    """Noticed by the next call."""
    for stage in model.stages:
        stage.transform_weight = nn.Parameter(stage.transform_weight * 0.9, requires_grad=False)
        stage.norm.bias.data = stage.norm.bias * 0.9
    model(x)
    return model


def from_file(model: nn.Module, x: Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.save(in_place(model, x), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("pack", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("road", [moved, in_place, loaded, assigned, replaced, from_file])
def test_exports_follow_the_weights(road: Callable[[nn.Module, Tensor], nn.Module], pack: bool) -> None:
    model = randomise(sct.CifarSeqResNet(8, 1, bottleneck=True)).eval()
    folded, x = sct.fuse(model, pack=pack), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = folded(x)
        changed = road(folded, x)
        with sct.use_backend("reference"):
            expected = changed(x)
        assert error(changed(x), expected) < 1e-5
        assert error(torch.export.export(changed, (x,)).module()(x), expected) < 1e-5
    assert (error(before, expected) > 1e-3) == (road is not moved)


def test_what_exports_cannot_follow() -> None:
    folded, x = sct.fuse(randomise(sct.CifarSeqResNet(8, 1))), torch.randn(2, 3, 8, 8)
    buffers = {name: tensor * 2 for name, tensor in folded.named_buffers() if "constants" in name}
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="are for exports; replace its packed weights"):
            torch.func.functional_call(folded, buffers, (x,))
        stage = folded.stages[1]
        stage.transform_weight.data = stage.transform_weight * 2
        with pytest.raises(RuntimeError, match="have been replaced, not changed in place: call the model once"):
            torch.export.export(folded, (x,))
        expected = folded(x)
        assert error(torch.export.export(folded, (x,)).module()(x), expected) < 1e-5


def test_hooks_on_convs_of_a_folded_model() -> None:
    """They are called while somebody watches them; the outputs are the same."""
    _, folded, x = fused(FAMILIES["cifar-bottleneck"])
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = folded(x)
        hook = folded.stages[1].constants.groups[3].transform.register_forward_hook(lambda *call: seen.append(call[2]))
        assert error(folded(x), expected) < 1e-5 and len(seen) == 1
        hook.remove()
        assert torch.equal(folded(x), expected) and len(seen) == 1


def test_layer_of_a_folded_stage_alone() -> None:
    """A stage whose input is activated has no BN in front."""
    stage = randomise(sct.Stage(Plan.stage(16, 4, 1, entry_channels=8))).eval()
    folded = sct.fuse(nn.Sequential(stage))
    x = torch.randn(2, 8, 9, 9)
    assert_constants(torch.export.export(folded, (x,)), conv_count(folded))

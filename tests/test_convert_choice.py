"""Which convs `convert` replaces, for which reasons others stay, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from backbones import BACKBONES, Bottleneck, conv3, network, vgg
from torch import Tensor, nn
from torch.nn.utils import prune

import seqconv_triton as sct


class Odd(nn.Module):
    """Every 3×3 conv here has its own reason to stay, but for `yes`, which has two names and a norm of its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.yes = self.alias = conv3(8, 8)
        self.yes_norm = nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)
        self.twice, self.tied, self.tied_to = conv3(8, 8), conv3(8, 8), nn.Conv2d(8, 8, 3)
        self.tied_to.weight = self.tied.weight
        self.dilated, self.unpadded = nn.Conv2d(8, 8, 3, padding=1, dilation=2), nn.Conv2d(8, 8, 3)
        self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.depthwise, self.unused, self.no_norm = conv3(8, 8, groups=8), conv3(8, 8), conv3(8, 8)
        self.training_only, self.two_readers, self.sigmoid = conv3(8, 8), conv3(8, 8), conv3(8, 8)
        self.weight_read, self.hooked, self.parametrized = conv3(8, 8), conv3(8, 8), conv3(8, 8)
        self.shared_norm, self.shared_norm_2, self.instance = conv3(8, 8), conv3(8, 8), conv3(8, 8)
        self.branches = conv3(8, 8)
        self.hooked.register_forward_hook(lambda *_: None)
        nn.utils.parametrizations.weight_norm(self.parametrized)
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(8) for name in NORMED})
        self.instance_norm = nn.InstanceNorm2d(8)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        if extra is not None:
            x = x + self.no_norm(extra)
        x = torch.relu(self.yes_norm(self.yes(x)))
        for name in ("tied", "parametrized", "hooked", "depthwise", "reflected", "weight_read"):
            x = F.relu(self.norms[name](getattr(self, name)(x)))
        for name in ("dilated", "unpadded"):
            x = F.relu(self.norms[name](F.pad(getattr(self, name)(x), (1, 1, 1, 1))))
        x = F.relu(self.norms["twice"](self.twice(self.twice(x))))
        x = F.relu(self.no_norm(x) + self.weight_read.weight.sum() + self.tied_to(x).sum())
        x = F.relu(self.norms["shared"](self.shared_norm(x)))
        x = F.relu(self.norms["shared"](self.shared_norm_2(x)))
        x = self.norms["sigmoid"](self.sigmoid(x)).sigmoid()
        x = F.relu(self.instance_norm(self.instance(x)))
        y = self.norms["two_readers"](self.two_readers(x))
        x = F.relu(y) + y
        y = self.training_only(x)
        x = F.relu(self.norms["training_only"](y)) + (y if self.training else 0)
        return F.relu(self.norms["branches"](self.branches(x)))


NORMED = (
    "tied", "parametrized", "hooked", "depthwise", "reflected", "weight_read", "dilated", "unpadded", "twice",
    "shared", "sigmoid", "two_readers", "training_only", "branches",
)  # fmt: skip


def test_reasons() -> None:
    model = Odd().eval()
    model.norms["twice"].train()
    model, report = sct.convert(model, lambda name, conv: 16 if name == "branches" else 4)
    assert model.yes is model.alias and isinstance(model.yes, sct.SeqConv2d)
    assert (model.yes.eps, model.yes.norm.momentum, model.yes.training) == (1e-3, 0.3, False)
    assert [row.name for row in report.replaced] == ["yes"]
    assert {row.name: row.reason for row in report.kept} == {
        "twice": "called 2 times: its weights are shared",
        "tied": "another module shares its weight",
        "tied_to": "padding (0, 0): a SeqConv layer keeps the image size",
        "dilated": "dilation 2: a SeqConv layer has none",
        "unpadded": "padding (0, 0): a SeqConv layer keeps the image size",
        "reflected": "padding_mode 'reflect': a SeqConv layer pads with zeros",
        "depthwise": "a depthwise conv",
        "unused": "not called in forward",
        "no_norm": "its output goes to add, not to a BatchNorm2d",
        "training_only": "its output goes to 2 places",
        "two_readers": "its BN's output goes to 2 places",
        "sigmoid": "its BN goes to sigmoid, not to ReLU",
        "weight_read": "its weight is also used directly",
        "hooked": "it has hooks",
        "parametrized": "a ParametrizedConv2d, no plain Conv2d",
        "shared_norm": "other convs share its BatchNorm2d",
        "shared_norm_2": "other convs share its BatchNorm2d",
        "instance": "its output goes to InstanceNorm2d, not to a BatchNorm2d",
        "branches": "not wider than one group (16): nothing to aggregate",
    }
    assert model.norms["twice"].training and not model.norms["tied"].training  # modes as they were


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (None, ["blocks.0.conv1", "blocks.2.conv1"]),
        ("blocks.2.*", ["blocks.2.conv1"]),
        (["blocks.0.conv1"], ["blocks.0.conv1"]),
        (lambda name, conv: conv.in_channels == 32, ["blocks.2.conv1"]),
    ],
    ids=["all", "pattern", "names", "function"],
)
def test_select(select: object, names: list[str]) -> None:
    _, report = sct.convert(BACKBONES["resnet-basic"](), 8, select=select)
    assert [row.name for row in report.replaced] == names
    kept = {row.name: row.reason for row in report.kept}
    assert all(kept[name] == "not selected" for name in {"blocks.0.conv1", "blocks.2.conv1"} - set(names))


def test_a_watched_relu_stays() -> None:
    model, seen = vgg(), []
    model[5].register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    model, _ = sct.convert(model, 8)
    model(torch.randn(2, 3, 4, 4))
    assert isinstance(model[5], nn.ReLU) and isinstance(model[8], nn.Identity) and seen == [(2, 16, 4, 4)]


class Recorder(nn.Module):
    """Leaves something behind in every forward pass, and looks at what torch.fx cannot see in a part of its own."""

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.mean() > 0 else -x

    def __init__(self) -> None:
        super().__init__()
        self.body, self.part, self.last = vgg()[:9], Recorder.Part(), None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.part(self.body(x))
        return self.last


def test_tracing_leaves_nothing_behind() -> None:
    """A part without convs may have control flow; the model's own attributes and buffers are as before."""
    model, report = sct.convert(Recorder(), 8)
    assert len(report.replaced) == 2 and model.last is None and model.calls == 0
    assert model(torch.randn(2, 3, 4, 4)) is model.last


@pytest.mark.parametrize("convert_sync", [sct.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_synchronised_norms_come_later(convert_sync: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ValueError, match="3: its BN is synchronised over ranks: convert first"):
        sct.convert(convert_sync(vgg()), 8)
    assert convert_sync(sct.convert(vgg(), 8)[0])[3].norm.process_group is None


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.pool = vgg()[:9], nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.body(x)) if x.sum() > 0 else x


BAD = {
    "no-module": (lambda: sct.convert([1], 8), TypeError, "model must be an nn.Module, not list"),
    "compiled": (lambda: sct.convert(torch.compile(vgg()), 8), TypeError, "OptimizedModule.*before compiling"),
    "wrapped": (lambda: sct.convert(nn.DataParallel(vgg()), 8), TypeError, "DataParallel.*wrapping"),
    "width-type": (lambda: sct.convert(vgg(), 8.0), TypeError, "group_width must be an int.*float"),
    "width-result": (lambda: sct.convert(vgg(), lambda name, conv: None), TypeError, "group_width.*NoneType"),
    "width-zero": (lambda: sct.convert(vgg(), 0), ValueError, r"group_width \(0\) must be at least 1"),
    "indivisible": (lambda: sct.convert(vgg(), 12), ValueError, r"6: out_channels \(32\).*group_width \(12\)"),
    "groups": (
        lambda: sct.convert(network(Bottleneck(32, 16, 4), width=32), 2), ValueError,
        r"blocks.0.conv2: group_width \(2\) is no multiple of the width of its groups \(4\)",
    ),
    "pattern": (lambda: sct.convert(vgg(), 8, select="layer*"), ValueError, "'layer.'; there are 0, 3, 6"),
    "select-type": (lambda: sct.convert(vgg(), 8, select=[3]), TypeError, "select must be.*not int"),
    "none-selected": (lambda: sct.convert(vgg(), 8, select=lambda *_: False), ValueError, "6: not selected"),
    "no-convs": (lambda: sct.convert(nn.Linear(2, 2), 8), ValueError, "Linear.*it has no 3×3 convs"),
    "dropout": (lambda: sct.convert(vgg(), 8, dropout=1.5), ValueError, "dropout"),
    "untraceable": (lambda: sct.convert(Untraceable(), 8), ValueError, "Untraceable.*torch.fx.*parts.*: body"),
    "own-network": (lambda: sct.convert(sct.CifarSeqResNet(8, 1), 8), ValueError, "CifarSeqResNet"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_forward_pre_hook"])
def test_no_hook_is_lost(at: int, register: str) -> None:
    model = vgg()
    getattr(model[3 + at], register)(lambda *_: None)
    _, report = sct.convert(model, 8)
    assert any(row.name == "3" and row.reason.endswith("has hooks") for row in report.kept)


COMPUTE = {
    "pruned": lambda conv, norm: prune.l1_unstructured(conv, "weight", 0.5),
    "pruned-bn": lambda conv, norm: prune.l1_unstructured(norm, "weight", 0.5),
    "weight-norm": lambda conv, norm: nn.utils.weight_norm(conv),
    "spectral-norm": lambda conv, norm: nn.utils.spectral_norm(conv),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("case", COMPUTE)
def test_no_computed_weight_is_lost(case: str) -> None:
    model = vgg()
    COMPUTE[case](model[3], model[4])
    _, report = sct.convert(model, 8)
    (row,) = (row for row in report.kept if row.name == "3")
    assert "weight is computed" in row.reason


class ReadsBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.rest = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), vgg()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(F.relu(self.bn(self.conv(x)))) + self.bn.bias.sum()


def test_a_bn_that_is_also_read_stays() -> None:
    model, report = sct.convert(ReadsBias(), 8)
    reasons = {row.name: row.reason for row in report.kept}
    assert "also used directly" in reasons["conv"] and type(model.bn) is nn.BatchNorm2d
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_an_error_changes_nothing() -> None:
    model = vgg()
    modules = list(model.modules())
    with pytest.raises(ValueError, match="group_width"):
        sct.convert(model, lambda name, conv: 8 if name == "3" else 12)
    assert list(model.modules()) == modules and all(module.training for module in modules)

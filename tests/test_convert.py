"""`convert` on backbones of the structures it is made for: what it replaces and keeps, and that the result works."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import error, everything, randomise
from torch import Tensor, nn

import seqconv_triton as sct


def conv3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=bias)


def vgg() -> nn.Module:
    """As torchvision's VGG with BN: convs with a bias, in-place ReLUs, an image's three channels first."""
    parts: list[nn.Module] = []
    for given, width in ((3, 16), (16, 16), (16, 32)):
        parts += [conv3(given, width, bias=True), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts, nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


class Basic(nn.Module):
    """ResNet's basic block; one ReLU module serves both places, as in torchvision."""

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(in_channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3(width, width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.project = (
            nn.Conv2d(in_channels, width, 1, stride) if (stride, in_channels) != (1, width) else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.project(x))


class Bottleneck(nn.Module):
    """ResNet's and ResNeXt's bottleneck block, with functional ReLUs."""

    def __init__(self, channels: int, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3(width, width, groups=groups), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y)).relu_()
        return F.relu(self.bn3(self.conv3(y)) + x)


class Network(nn.Module):
    """A stem with an image's channels, blocks, a classifier."""

    def __init__(self, *blocks: nn.Module, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv3(3, width), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def network(*blocks: nn.Module, width: int = 16) -> nn.Module:
    model = Network(*blocks, width=width)
    model(torch.randn(2, 3, 4, 4))
    return model


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg,
    "resnet-basic": lambda: network(Basic(16, 16), Basic(16, 32, stride=2), Basic(32, 32)),
    "resnet-bottleneck": lambda: network(Bottleneck(32, 16), Bottleneck(32, 16), width=32),
    "resnext": lambda: network(Bottleneck(32, 16, groups=4), width=32),
}
# Names, group width, and what a layer's parameters change by: a bias in front of a BN goes, ResNeXt's layers get the
# 1×1 conv of a bottleneck layer with its BN.
REPLACED = {
    "vgg": (["3", "6"], 8, -16 - 32),
    "resnet-basic": (["blocks.0.conv1", "blocks.2.conv1"], 8, 0),
    "resnet-bottleneck": (["blocks.0.conv2", "blocks.1.conv2"], 4, 0),
    "resnext": (["blocks.0.conv2"], 8, 16 * 16 + 2 * 16),
}


def converted(name: str) -> tuple[nn.Module, sct.interop.convert.ConversionReport]:
    return sct.convert(BACKBONES[name](), REPLACED[name][1])


@pytest.mark.parametrize("name", BACKBONES)
def test_replaces_triples_and_nothing_else(name: str) -> None:
    model = randomise(BACKBONES[name]())
    before, count = copy.deepcopy(model.state_dict()), sum(p.numel() for p in model.parameters())
    names, k, change = REPLACED[name]
    same, report = sct.convert(model, k)
    assert same is model
    assert [row.name for row in report.replaced] == names
    assert report.parameters_before == count
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) == count + change
    assert sum(row.parameters_after - row.parameters_before for row in report.replaced) == change
    for row in report.replaced:
        layer = model.get_submodule(row.name)
        assert isinstance(layer, sct.SeqConv2d) and layer.plan.group_width == k
        assert row.parameters_after == sum(p.numel() for p in layer.parameters())
    layers = tuple(f"{row.name}." for row in report.replaced)
    after = model.state_dict()
    kept = [key for key in after if not key.startswith(layers)]
    assert len(kept) == len(before) - sum(1 for key in before if key.startswith(layers)) - 5 * len(names)
    assert all(torch.equal(after[key], before[key]) for key in kept)


@pytest.mark.parametrize("name", BACKBONES)
def test_training_step_and_compiled_equals_eager(name: str) -> None:
    """Through AOTAutograd; test_inductor does one through the code generator."""
    model, _ = converted(name)
    randomise(model).double().train()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    eager = everything(model, x, lambda m, t: [m(t)])
    compiled = everything(model, x, lambda m, t: [torch.compile(m, fullgraph=True, backend="aot_eager")(t)])
    assert all(error(compiled[key], eager[key]) < 1e-10 for key in eager)
    assert all(gradient.count_nonzero() for key, gradient in eager.items() if key in dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model.eval()(x), copy.deepcopy(model)(x))


def test_inductor() -> None:
    model = randomise(sct.convert(nn.Sequential(Basic(16, 16)), 8)[0]).eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert error(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", ["resnet-basic", "resnext"])
def test_converted_model_equals_one_written_with_seqconv(name: str) -> None:
    """Layer for layer against the equations: what stays around a layer (a shared ReLU) changes nothing."""
    model = randomise(converted(name)[0]).double().eval()
    block = model.blocks[0]
    x = torch.randn(2, 16 if name == "resnet-basic" else 32, 5, 5, dtype=torch.float64)
    if name == "resnet-basic":
        expected = F.relu(block.bn2(block.conv2(block.conv1(x))) + x)
    else:
        expected = F.relu(block.bn3(block.conv3(block.conv2(F.relu(block.bn1(block.conv1(x)))))) + x)
    assert torch.equal(block(x), expected)


def test_exports_folds_and_loads() -> None:
    model = randomise(converted("resnext")[0]).eval()
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    assert error(program.module()(torch.cat([x, x])), model(torch.cat([x, x]))) < 1e-5
    assert error(sct.fuse(model)(x), model(x)) < 1e-5
    other = converted("resnext")[0].eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


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
        "hooked": "it has forward hooks",
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


def test_options_reach_the_layers() -> None:
    model, report = sct.convert(
        BACKBONES["vgg"]().to(torch.bfloat16), lambda name, conv: conv.out_channels // 4,
        bottleneck=True, windowed=False, dropout=0.25,
    )  # fmt: skip
    plan = model[3].plan
    assert [r.name for r in report.replaced] == ["0", "3", "6"]  # dense windows: an image's channels will do
    assert (plan.bottleneck, plan.group_width, plan.layers[0].windowed, model[3].dropout) == (True, 4, False, 0.25)
    assert model[3].transform_weight.dtype == model[3].norm.weight.dtype == torch.bfloat16


def test_converts_in_steps_and_parts() -> None:
    model = BACKBONES["resnet-basic"]()
    model, _ = sct.convert(model, 8, select="blocks.0.*")
    first = model.blocks[0].conv1
    model.blocks, report = sct.convert(model.blocks, 16)
    assert [row.name for row in report.replaced] == ["2.conv1"] and model.blocks[0].conv1 is first


def test_report_reads_well() -> None:
    report = converted("resnext")[1]
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert "blocks.0.conv2 16→16, 4 groups 2 groups of 8, bottleneck, 2 subgroups 608 → 896" in lines
    assert "stem.0 3→32 in_channels (3) below group_width (8): windows would skip channels" in lines
    assert lines[-1] == f"parameters of the model: {report.parameters_before:,} → {report.parameters_after:,}"


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


def test_an_error_changes_nothing() -> None:
    model = vgg()
    modules = list(model.modules())
    with pytest.raises(ValueError, match="group_width"):
        sct.convert(model, lambda name, conv: 8 if name == "3" else 12)
    assert list(model.modules()) == modules and all(module.training for module in modules)


def library(name: str) -> object:
    """A package that may be missing, or that a CPU build of torch cannot import."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as problem:
        pytest.skip(f"{name}: {problem}")


# Triples at stride 1 that are wide enough, counted in the papers' tables.
LIBRARIES = {
    "torchvision-resnet18": ("torchvision.models", "resnet18", 5, 0),
    "torchvision-resnet50": ("torchvision.models", "resnet50", 13, 0),
    "torchvision-resnext50": ("torchvision.models", "resnext50_32x4d", 13, 3_665_152),
    "torchvision-vgg11-bn": ("torchvision.models", "vgg11_bn", 7, -2688),
    "timm-resnet18": ("timm", "resnet18", 5, 0),
    "timm-resnext50": ("timm", "resnext50_32x4d", 13, 3_665_152),
    "timm-vgg11-bn": ("timm", "vgg11_bn", 7, -2688),
    "timm-dla34": ("timm", "dla34", 8, 0),
    "timm-vovnet": ("timm", "vovnet39a", 31, 0),
}


@pytest.mark.parametrize("case", LIBRARIES)
def test_models_of_libraries(case: str) -> None:
    package, name, count, change = LIBRARIES[case]
    module = library(package)
    device = "cpu" if name in ("resnet18", "dla34") else "meta"  # there the sizes are real and the numbers are not
    with torch.device(device):
        model = module.create_model(name) if package == "timm" else getattr(module, name)()
        model, report = sct.convert(model, 32)
        assert len(report.replaced) == count
        assert report.parameters_after - report.parameters_before == change
        model.train()(torch.randn(2, 3, 64, 64)).mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)

"""`convert` on backbones of the structures it is made for: the result is what it should be, and works."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from backbones import BACKBONES, REPLACED, Basic, converted
from helpers import DOCS, error, everything, python_blocks, randomise
from torch import nn

import seqconv_triton as sct


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
    for results in (eager, compiled):
        results.pop("0.bias", None)  # a bias in front of a BN: its gradient is nothing but rounding
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


def test_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every Python block of docs/convert.md, and it prints what it says it prints."""
    for code in python_blocks("convert.md"):
        exec(code, {})
    printed = capsys.readouterr().out
    assert printed.strip() in (DOCS / "convert.md").read_text(encoding="utf-8")


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

"""Heat maps of connections: the numbers against plain loops over unpacked weights, the picture, every kind of file."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import randomise
from runs import run_recipe
from torch import Tensor

import seqconv_triton as sct
from recipes.figures.connections import Connections, group_strengths, layer_connections, stage_connections
from recipes.figures.networks import layers
from recipes.training.baseline import PreactivationResNet
from seqconv_triton.models.cifar import CifarSeqResNet
from seqconv_triton.plan import Plan, Tail

Table = dict[tuple[int, int], float]  # (target group, source group), both as the paper counts them


def by_definition(weights: list[Tensor], in_channels: int, k: int, windowed: bool) -> Table:
    """Mean |w| by the paper's words: group i sees the last C channels (dense: all) of [x_0, x_1, …, x_(i−1)]."""
    newest_first = [-1 - n // k for n in range(in_channels)]
    table: Table = {}
    for i, weight in enumerate(weights, 1):
        owners = newest_first[::-1] + [source for source in range(1, i) for _ in range(k)]
        seen = owners[-in_channels:] if windowed else owners
        assert weight.shape[1] == len(seen)
        found: dict[int, list[float]] = {}
        for channel, owner in enumerate(seen):
            found.setdefault(owner, []).extend(abs(v) for v in weight[:, channel].double().flatten().tolist())
        table |= {(i, owner): sum(values) / len(values) for owner, values in found.items()}
    largest = max(table.values())
    return {place: value / largest for place, value in table.items()}


def as_table(connections: Connections) -> Table:
    strength = connections.strength
    return {
        (row + 1, connections.sources[column]): float(strength[row, column])
        for row, column in np.argwhere(~np.ma.getmaskarray(strength)).tolist()
    }


def assert_same(connections: Connections, expected: Table) -> None:
    got = as_table(connections)
    assert got.keys() == expected.keys()
    assert max(abs(got[place] - expected[place]) for place in expected) < 1e-12


def unpacked(part: sct.SeqConv2d, kernel: int) -> list[Tensor]:
    """The convs over the windows, cut out of the packed tensor by their sizes alone."""
    packed = (part.reduce_weight if part.plan.bottleneck else part.transform_weight).detach().flatten()
    weights, start = [], 0
    for group in part.plan.groups:
        shape = (part.plan.group_width, group.window_width, kernel, kernel)
        size = int(np.prod(shape))
        weights.append(packed[start : start + size].view(shape))
        start += size
    assert start == packed.numel()
    return weights


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "k", "options"),
    [
        pytest.param(8, 8, 4, {}, id="basic"),
        pytest.param(8, 8, 4, {"bottleneck": True}, id="bottleneck"),
        pytest.param(8, 16, 4, {"bottleneck": True, "subgroups": 2}, id="subgroups-wider"),
        pytest.param(16, 8, 4, {"windowed": False}, id="dense"),
        pytest.param(10, 12, 4, {}, id="C10-is-no-multiple-of-k4"),
        pytest.param(3, 20, 4, {"bottleneck": True}, id="window-narrower-than-a-group"),
        pytest.param(5, 9, 3, {"windowed": False, "bottleneck": True}, id="dense-C5-k3"),
        pytest.param(7, 4, 4, {}, id="one-group"),
    ],
)
def test_layer_equals_the_definition(in_channels: int, out_channels: int, k: int, options: dict[str, Any]) -> None:
    part = sct.SeqConv2d(in_channels, out_channels, k, dtype=torch.float64, **options)
    randomise(part)
    weights = unpacked(part, 1 if part.plan.bottleneck else 3)
    expected = by_definition(weights, in_channels, k, options.get("windowed", True))
    assert_same(layer_connections(part, 0), expected)


@pytest.mark.parametrize("name", ["cifar_seqresnet_r4_k8", "cifar_seqresnet_dense_r3_k8_n121", "seqresnext_24"])
def test_network_equals_the_oracles_own_weights(name: str) -> None:
    """Every layer of a network, from the weights that the independent oracle holds under the published names."""
    builders = {
        "cifar_seqresnet_r4_k8": oracle.seqresnet_r4_k8,
        "cifar_seqresnet_dense_r3_k8_n121": oracle.ablation_dense_r3_k8,
        "seqresnext_24": oracle.seqresnext_24,
    }
    theirs = oracle.randomise(builders[name](), 3)
    model = sct.load_published(sct.create_model(name), theirs.state_dict())
    modules = dict(theirs.named_modules())
    found = layers(model)
    checked = found if name.startswith("cifar") else found[:4]  # a loop over channels is slow for wide ones
    for one in checked:
        layer = modules[one.name]
        units = [group[0].LinearLayer.weight.detach() for group in layer.groups]
        expected = by_definition(units, layer.in_channels, layer.group_width, layer.windowed)
        assert_same(layer_connections(one.stage, one.layer), expected)
    wanted = {label for label, module in modules.items() if isinstance(module, oracle.SeqConvLayer)}
    assert {one.name for one in found} == wanted


def test_stage_holds_its_layers() -> None:
    """A stage's band is its layers', row by row, at the columns that the buffer gives them."""
    plan = Plan.stage(8, 4, 2, entry_channels=6, extension=4, bottleneck=False, tail=Tail(12, 3, 2, 3))
    part = randomise(sct.Stage(plan))
    band = stage_connections(part)
    assert band.edges == (0, 2, 4, 6, 8, 10) and band.strength.shape == (11, 2 + 10)
    assert band.sources == (-2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    covered = 0
    for layer, first in enumerate(band.edges):
        own = layer_connections(part, layer)
        for (target, source), value in as_table(own).items():
            column = 2 + first + source - (source > 0)  # own groups of a layer follow its input's without a 0
            assert band.strength[first + target - 1, column] == pytest.approx(value, abs=1e-12)
            covered += 1
    assert covered == band.strength.count()


def test_strengths_are_not_normalised_and_masked_outside() -> None:
    plan = Plan.layer(4, 4, 2)
    weights = [torch.full((2, 4, 3, 3), value) for value in (-3.0, 0.5)]
    strength = group_strengths(weights, plan, 0, 2)
    assert strength.tolist() == [[3.0, 3.0, None], [None, 0.5, 0.5]]


def test_untrained_layer_is_all_zeros() -> None:
    model = CifarSeqResNet(4, 1)
    strength = layer_connections(model.stages[1], 1).strength
    assert strength.max() == 0 and np.isfinite(strength.compressed()).all()


def test_picture_is_white_outside_the_window() -> None:
    pytest.importorskip("matplotlib", reason="the plot extra")
    from recipes.heatmap import draw, layer_panels

    figure = draw([("one", layer_panels(randomise(CifarSeqResNet(4, 1))))])
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title().splitlines()[0] for axes in shown] == [f"Stage{n}.0.LayerB" for n in (1, 2, 3)]
    image = shown[0].images[0]
    assert image.get_array().shape == (4, 7) and image.get_clim() == (0, 1)
    pixels = image.cmap(image.norm(image.get_array()))
    assert np.array_equal((pixels == 1).all(-1), np.ma.getmaskarray(image.get_array()))
    assert any("mean |weight|" in axes.get_ylabel() for axes in figure.axes)
    labels = [label.get_text() for label in shown[0].get_xticklabels()]
    assert labels == ["−4", "−3", "−2", "−1", "1", "2", "3"]


SMALL = {"group_width": 4, "widen": 1, "blocks": [1, 2, 1], "in_chans": 1, "num_classes": 3}
NAMED = "cifar_seqresnet_b_r7_k16"


def small() -> dict[str, Tensor]:
    return randomise(CifarSeqResNet(**SMALL)).state_dict()


def demo_state(name: str) -> dict[str, object]:
    from recipes.demo import networks

    return {"model": networks(10)[name]().state_dict(), "epochs": 1, "seed": 0}


def trained(**changes: object) -> dict[str, object]:
    state = {
        "format": "seqconv_triton training",
        "model": small(),
        "arch": {"name": "cifar_custom", "options": SMALL},
        "classes": ("a", "b", "c"),
        "epoch": 7,
        "best_error": 2.5,
    }
    return state | changes


def named(**options: int) -> dict[str, Tensor]:
    return randomise(sct.create_model(NAMED, **options)).state_dict()


KINDS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "training": (trained, []),
    "training-of-a-registry-model": (
        lambda: trained(model=named(num_classes=7), arch={"name": NAMED, "options": {}}),
        [],
    ),
    "demo": (lambda: demo_state("SeqResNet"), []),
    "state-dict": (lambda: named(in_chans=1, num_classes=4), ["--model", NAMED]),
    "compiled-and-parallel": (
        lambda: {f"module._orig_mod.{name}": value for name, value in named().items()},
        ["--model", NAMED],
    ),
    "published": (
        lambda: {"state_dict": {f"module.{n}": v for n, v in sct.export_published(sct.create_model(NAMED)).items()}},
        ["--model", NAMED],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra")
    if kind == "demo":
        pytest.importorskip("sklearn", reason="the demo's extra")
    build, options = KINDS[kind]
    torch.save(build(), tmp_path / "net.pt")
    picture = tmp_path / "new" / "map.png"
    assert run_recipe(["heatmap", str(tmp_path / "net.pt"), *options, "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in picture.parent.iterdir()] == ["map.png"]
    assert "3 heat maps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--layers", "head", "Stage2.?.LayerA", "Downsample*"], 5),
        (["--stages"], 3),
        (["--beside", "{net}", "--titles", "one", "two"], 6),
    ],
)
def test_what_is_drawn(options: list[str], count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As SVG, whose bytes are the same every time."""
    pytest.importorskip("matplotlib", reason="the plot extra")
    torch.save(trained(), tmp_path / "net.pt")
    options = [option.format(net=tmp_path / "net.pt") for option in options]
    for name in ("a.svg", "b.svg"):
        assert run_recipe(["heatmap", str(tmp_path / "net.pt"), *options, "--output", str(tmp_path / name)]) == 0
        assert f"{count} heat maps" in capsys.readouterr().out
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def broken(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state["stages.0.transform_weight"][0] = float("nan")
    return state


class Code:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (Path("trap"),))


ERRORS: dict[str, tuple[object, list[str], str]] = {
    "missing": (None, [], "No such file"),
    "empty": (b"", [], "is empty (0 bytes)"),
    "text": (b"<html>", [], "is no PyTorch file"),
    "code": (pickle.dumps(Code()), [], "holds other objects than tensors and plain values: code is not run"),
    "half": (lambda path: torch_bytes(trained())[:5000], [], "damaged or was only half written"),
    "list": ([1, 2], [], "holds a list"),
    "no-weights": ({"epoch": 3}, [], "holds no weights"),
    "numbers-for-names": (lambda path: {1: torch.zeros(2)}, ["--model", NAMED], "holds no weights"),
    "no-name": (lambda path: named(), [], "add --model NAME"),
    "unknown-name": (lambda path: named(), ["--model", "resnet"], "unknown model 'resnet'"),
    "other-network": (lambda path: named(), ["--model", "cifar_seqresnet_r4_k8"], "does not fit CifarSeqResNet"),
    "other-published": (
        lambda path: sct.export_published(sct.create_model(NAMED)),
        ["--model", "cifar_seqresnet_r4_k8"],
        "does not fit CifarSeqResNet: missing: ",
    ),
    "arch-unknown": (lambda path: trained(arch={"name": "resnet", "options": {}}), [], "unknown model 'resnet'"),
    "arch-options": (
        lambda path: trained(arch={"name": "cifar_custom", "options": {"depth": 3}}),
        [],
        "unexpected keyword argument 'depth'",
    ),
    "arch-values": (
        lambda path: trained(arch={"name": "cifar_custom", "options": SMALL | {"group_width": 0}}),
        [],
        "group_width (0) must be at least 1",
    ),
    "arch-text": (lambda path: trained(arch={"name": "x"}), [], "not known here"),
    "another-family": (
        lambda path: PreactivationResNet((4, 8, 16), 1, num_classes=10, in_chans=1).state_dict(),
        ["--model", NAMED],
        "does not fit CifarSeqResNet: missing: ",
    ),
    "not-finite": (lambda path: trained(model=broken(small())), [], "weights that are not finite"),
    "unknown-layer": (trained, ["--layers", "Stage9.*"], "no layer is called 'Stage9.*'; there are Head, Stage1.0"),
    "format": (trained, ["--output", "map.jpg"], "must end in .png, .svg, .pdf"),
    "output-folder": (trained, ["--output", "folder.png"], "is a folder"),
    "titles": (trained, ["--titles", "a", "b"], "titles (2) must be as many as checkpoints (1)"),
}


def torch_bytes(state: object) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_write_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra")
    monkeypatch.chdir(tmp_path)
    content, options, message = ERRORS[case]
    if callable(content):
        content = content() if content is trained else content(tmp_path)
    if content is not None:
        data = content if isinstance(content, bytes) else torch_bytes(content)
        Path("net.pt").write_bytes(data)
    Path("folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    output = [] if "--output" in options else ["--output", "map.png"]
    assert run_recipe(["heatmap", "net.pt", *options, *output]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.iterdir()) == before

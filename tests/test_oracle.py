"""The oracle against the paper and its published files: exact counts of parameters and operations, names, shapes."""

import re

import oracle
import pytest
import torch
from oracle import CifarNet, SeqConvLayer
from torch import nn

PARAMETERS = {
    "seqresnet_b22": 11_859_656,
    "seqresnet_b42": 25_642_696,
    "seqresnext_24": 26_211_784,
    "seqresnet_r4_k8": 1_233_370,
    "seqresnet_r10_k8": 7_575_514,
    "seqresnet_b_r7_k16": 843_834,
    "seqresnet_b_r20_k32": 6_024_794,
    "ablation_dense_r3_k8": 1_229_658,
    "ablation_r4_k16": 1_254_106,
    "ablation_r3_k16": 1_256_154,
}
IMAGENET = ["seqresnet_b22", "seqresnet_b42", "seqresnext_24"]
CIFAR = [name for name in PARAMETERS if name not in IMAGENET]


def on_meta(name: str, **settings: object) -> nn.Module:
    with torch.device("meta"):
        return getattr(oracle, name)(**settings)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items(), ids=PARAMETERS)
def test_parameters(name: str, count: int) -> None:
    assert parameters(on_meta(name)) == count


@pytest.mark.parametrize("name", CIFAR)
def test_100_classes(name: str) -> None:
    net = on_meta(name, num_classes=100)
    assert parameters(net) - PARAMETERS[name] == 90 * (net.Classifier.in_features + 1)


@pytest.mark.parametrize(
    ("name", "gigamacs", "gflops"),
    [("seqresnet_b22", 2.8827, 2.73), ("seqresnet_b42", 5.6444, 5.33), ("seqresnext_24", 4.5440, 4.32)],
    ids=IMAGENET,
)
def test_operations(name: str, gigamacs: float, gflops: float) -> None:
    net = on_meta(name)
    assert round(oracle.conv_macs(net, (3, 224, 224), classifier=True) / 1e9, 4) == gigamacs
    assert round(oracle.paper_gflops(net, (3, 224, 224)), 2) == gflops


def test_operations_by_hand() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    net = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU())
    macs, outputs = 6 * 2 * 9 * 3 * 4, 6 * 3 * 4
    assert oracle.conv_macs(net, (4, 5, 7)) == macs
    assert oracle.paper_gflops(net, (4, 5, 7)) == (macs + 5 * outputs) / 2**30
    assert oracle.conv_macs(nn.Linear(7, 5), (7,), classifier=True) == 35
    assert conv.weight.device.type == "cpu", "counting must leave the model alone"


@pytest.mark.parametrize(
    ("blocks", "extensions", "fits"),
    [(False, False, True), (False, True, False), (True, False, False)],
    ids=["all-dense", "blocks-dense", "extensions-dense"],
)
def test_ablation_is_dense_everywhere(blocks: bool, extensions: bool, fits: bool) -> None:
    """Which layers of Table 5's unwindowed network are dense: the count admits one answer."""
    with torch.device("meta"):
        net = CifarNet(group_width=8, widen=3, blocks=(1, 2, 1), windowed=blocks)
        for n in (1, 2):
            down = getattr(net, f"Downsample{n}")
            down.ExtensionLayer = SeqConvLayer(48 * n, 48, 8, bottleneck=False, windowed=extensions)
    assert (parameters(net) == 1_229_658) == fits


def unit_names(prefix: str) -> str:
    tensors = "weight|bias|running_mean|running_var|num_batches_tracked"
    return rf"{prefix}\.(LinearLayer\.weight|BatchNormalizationLayer\.({tensors}))"


def matches(units: list[str], name: str) -> bool:
    patterns = [unit_names(u) for u in units] + [r"Classifier\.(weight|bias)"]
    return any(re.fullmatch(p, name) for p in patterns)


LAYERS = r"(Stage\d\.\d\.Layer[AB]|Downsample\d\.ExtensionLayer|{head})\."
FILTER = r"Filters\.\d+"
PAIR = r"\.(Bottleneck|Transformation)Layer"
STEM = ["Head0", "Head1", "ShrinkingLayer", "Blender", r"Downsample[123]\.ShrinkingLayer"]
CIFAR_STEM = ["Init", "Blender", r"Downsample[12]\.ShrinkingLayer"]


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("seqresnet_b42", [*STEM, LAYERS.format(head="Head2") + FILTER + PAIR]),
        ("seqresnext_24", [*STEM, LAYERS.format(head="Head2") + r"(Bottleneck|Transformation)Layers\.\d+"]),
        ("seqresnet_r4_k8", [*CIFAR_STEM, LAYERS.format(head="Head") + FILTER]),
        ("seqresnet_b_r7_k16", [*CIFAR_STEM, LAYERS.format(head="Head") + FILTER + PAIR]),
    ],
)
def test_published_names(name: str, units: list[str]) -> None:
    names = on_meta(name).state_dict()
    assert [n for n in names if not matches(units, n)] == []
    for unit in units:
        assert any(re.fullmatch(unit_names(unit), n) for n in names), unit


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("seqresnet_b22", "Head2.Filters.3.BottleneckLayer.LinearLayer.weight", (32, 128, 1, 1)),
        ("seqresnet_b22", "Stage3.1.LayerB.Filters.7.TransformationLayer.LinearLayer.weight", (64, 64, 3, 3)),
        (
            "seqresnet_b22",
            "Downsample3.ExtensionLayer.Filters.7.BottleneckLayer.LinearLayer.weight",
            (64, 512, 1, 1),
        ),
        ("seqresnext_24", "Downsample2.ShrinkingLayer.LinearLayer.weight", (1024, 16, 3, 3)),
        ("seqresnext_24", "Stage4.0.LayerA.TransformationLayers.15.LinearLayer.weight", (128, 32, 3, 3)),
        ("seqresnet_r4_k8", "Stage3.0.LayerB.Filters.23.LinearLayer.weight", (8, 192, 3, 3)),
        ("ablation_dense_r3_k8", "Stage2.1.LayerB.Filters.11.LinearLayer.weight", (8, 184, 3, 3)),
        ("seqresnet_r4_k8", "Classifier.weight", (10, 192)),
    ],
)
def test_published_shapes(name: str, key: str, shape: tuple[int, ...]) -> None:
    assert tuple(on_meta(name).state_dict()[key].shape) == shape


def test_bad_settings_speak() -> None:
    with pytest.raises(ValueError, match="10 channels do not divide into groups of 4"):
        SeqConvLayer(8, 10, 4, bottleneck=False, windowed=True)
    with pytest.raises(ValueError, match="only for bottleneck layers"):
        SeqConvLayer(8, 8, 4, bottleneck=False, windowed=True, subgroups=2)

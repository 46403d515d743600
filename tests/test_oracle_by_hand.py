"""What the oracle computes: layers, blocks and wiring against windows written out by hand, masks, random weights."""

import re
from collections.abc import Iterator

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import CifarNet, Downsample, ImageNetNet, ResidualBlock, SeqConvLayer, Unit, randomise
from torch import Tensor, nn

TINY_IMAGENET = ((8, 16), (4, 8), (2, 4), (1, 2))  # channels, group widths, subgroups, blocks of two stages


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for one another: small nets took 15-30 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def image(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ready(module: nn.Module, seed: int = 3) -> nn.Module:
    return randomise(module.double(), seed).eval()


def by_hand(unit: Unit, x: Tensor, shortcut: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """(raw, activated) of a 1x1 or 3x3 unit of stride 1 in evaluation mode, from its tensors alone."""
    weight, bn = unit.LinearLayer.weight, unit.BatchNormalizationLayer
    groups = x.shape[1] // weight.shape[1]
    raw = F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups) + shortcut
    mean, var, gain, bias = (t[:, None, None] for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return raw, ((raw - mean) / (var + 1e-5) ** 0.5 * gain + bias).clamp(min=0)


def same(got: tuple[Tensor, Tensor], raws: list[Tensor], activated: list[Tensor]) -> None:
    torch.testing.assert_close(got[0], torch.cat(raws, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], torch.cat(activated, 1), rtol=1e-12, atol=1e-12)


def test_windows_by_hand() -> None:
    layer = ready(SeqConvLayer(4, 6, 2, bottleneck=False, windowed=True))
    x = image(2, 4, 5, 3)
    r1, x1 = by_hand(layer.Filters[0], x)
    r2, x2 = by_hand(layer.Filters[1], torch.cat([x[:, 2:4], x1], 1))
    r3, x3 = by_hand(layer.Filters[2], torch.cat([x1, x2], 1))
    same(layer(x), [r1, r2, r3], [x1, x2, x3])


def test_window_is_no_multiple_of_the_group() -> None:
    layer = ready(SeqConvLayer(3, 6, 2, bottleneck=False, windowed=True))
    x = image(1, 3, 4, 4)
    r1, x1 = by_hand(layer.Filters[0], x)
    r2, x2 = by_hand(layer.Filters[1], torch.cat([x[:, 2:3], x1], 1))
    r3, x3 = by_hand(layer.Filters[2], torch.cat([x1[:, 1:2], x2], 1))
    same(layer(x), [r1, r2, r3], [x1, x2, x3])


def test_window_is_narrower_than_the_group() -> None:
    layer = ready(SeqConvLayer(3, 8, 4, bottleneck=False, windowed=True))
    x = image(1, 3, 4, 4)
    r1, x1 = by_hand(layer.Filters[0], x)
    r2, x2 = by_hand(layer.Filters[1], x1[:, 1:4])
    same(layer(x), [r1, r2], [x1, x2])


@pytest.mark.parametrize("naming", ["filters", "split"])
def test_dense_bottleneck_by_hand(naming: str) -> None:
    """Subgroups 2: output channels 0-1 and 2-3 of each 3x3 conv read one half of the 1x1 conv's four each."""
    layer = ready(SeqConvLayer(3, 8, 4, bottleneck=True, windowed=False, subgroups=2, naming=naming))
    if naming == "filters":
        pairs = [(f.BottleneckLayer, f.TransformationLayer) for f in layer.Filters]
    else:
        pairs = list(zip(layer.BottleneckLayers, layer.TransformationLayers, strict=True))
    x = image(1, 3, 4, 5)
    _, b1 = by_hand(pairs[0][0], x)
    r1, x1 = by_hand(pairs[0][1], b1)
    _, b2 = by_hand(pairs[1][0], torch.cat([x, x1], 1))
    r2, x2 = by_hand(pairs[1][1], b2)
    assert pairs[1][0].LinearLayer.weight.shape == (4, 7, 1, 1)
    assert pairs[1][1].LinearLayer.weight.shape == (4, 2, 3, 3)
    same(layer(x), [r1, r2], [x1, x2])


def test_shortcut_enters_before_the_group_is_seen() -> None:
    block = ready(ResidualBlock(4, group_width=2, bottleneck=False, windowed=True))
    raw, activated = image(2, 4, 3, 3), image(2, 4, 3, 3, seed=8)
    a = block.LayerA(activated)[1]
    r1, x1 = by_hand(block.LayerB.Filters[0], a, raw[:, :2])
    r2, x2 = by_hand(block.LayerB.Filters[1], torch.cat([a[:, 2:], x1], 1), raw[:, 2:])
    same(block(raw, activated), [r1, r2], [x1, x2])


@pytest.mark.parametrize("repeat", [False, True], ids=["paper", "published-quirk"])
def test_downsample_by_hand(repeat: bool) -> None:
    layer = {"group_width": 2, "bottleneck": False, "windowed": True}
    down = ready(Downsample(4, 8, shrink=4, repeat_extension=repeat, **layer))
    x = image(2, 4, 5, 4)
    extension = down.ExtensionLayer(x)[1]
    features = torch.cat([extension if repeat else x, extension], 1)
    weight = down.ShrinkingLayer.LinearLayer.weight
    slices = [slice(2 * g, 2 * g + 2) for g in range(4)]
    raw = torch.cat([F.conv2d(features[:, s], weight[s], stride=2, padding=1) for s in slices], 1)
    got, activated = down(x)
    assert got.shape == (2, 8, 3, 2)
    torch.testing.assert_close(got, raw, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(activated, down.ShrinkingLayer.BatchNormalizationLayer(raw).relu())


def test_training_statistics() -> None:
    unit = randomise(Unit(3, 2, 3).double(), 1).train()
    before = unit.BatchNormalizationLayer.running_var.clone()
    raw, activated = unit(image(2, 3, 4, 4))
    mean, var = raw.mean((0, 2, 3)), raw.var((0, 2, 3), correction=0)
    bn = unit.BatchNormalizationLayer
    gain = bn.weight / (var + 1e-5) ** 0.5
    expected = ((raw - mean[:, None, None]) * gain[:, None, None] + bn.bias[:, None, None]).relu()
    torch.testing.assert_close(activated, expected)
    torch.testing.assert_close(bn.running_var, 0.9 * before + 0.1 * var * 32 / 31)


def test_cifar_wiring() -> None:
    net = ready(CifarNet(group_width=8, widen=1, blocks=(1, 2, 1)))
    x = image(2, 3, 9, 8)
    raw, a = net.Head(net.Init(x)[1])
    raw, a = net.Stage1[0](raw, a)
    raw, a = net.Downsample1(a)
    raw, a = net.Stage2[0](raw, a)
    raw, a = net.Stage2[1](raw, a)
    raw, a = net.Downsample2(a)
    raw, a = net.Stage3[0](raw, a)
    a = net.Blender(a)[1]
    assert a.shape == (2, 48, 3, 2)
    torch.testing.assert_close(net(x), net.Classifier(a.sum((2, 3)) / 6))


@pytest.mark.parametrize("naming", ["filters", "split"])
def test_imagenet_wiring(naming: str) -> None:
    net = ready(ImageNetNet(*TINY_IMAGENET, naming=naming, num_classes=5, in_chans=2))
    x = image(2, 2, 17, 16)
    a = net.Head2(net.Head1(net.Head0(x)[1])[1])[1]
    assert a.shape == (2, 8, 9, 8)
    raw, a = net.ShrinkingLayer(a)
    raw, a = net.Stage1[0](raw, a)
    raw, a = net.Downsample1(a)
    raw, a = net.Stage2[0](raw, a)
    raw, a = net.Stage2[1](raw, a)
    assert net.Downsample1.ShrinkingLayer.LinearLayer.groups == 16 // 8 * 4
    assert net.ShrinkingLayer.LinearLayer.groups == 8 // 4 * 2
    torch.testing.assert_close(net(x), net.Classifier(net.Blender(a)[1].mean((2, 3))))


def test_both_namings_are_one_function() -> None:
    filters = ready(ImageNetNet(*TINY_IMAGENET, num_classes=5))
    split = ready(ImageNetNet(*TINY_IMAGENET, num_classes=5, naming="split"), seed=9)
    rename = r"Filters\.(\d+)\.(Bottleneck|Transformation)Layer"
    split.load_state_dict({re.sub(rename, r"\2Layers.\1", k): v for k, v in filters.state_dict().items()})
    x = image(2, 3, 16, 16)
    torch.testing.assert_close(filters(x), split(x), rtol=0, atol=0)


def test_repeat_extension_changes_the_function_alone() -> None:
    paper = ready(ImageNetNet(*TINY_IMAGENET, num_classes=5))
    quirk = ready(ImageNetNet(*TINY_IMAGENET, num_classes=5, repeat_extension=True), seed=9)
    quirk.load_state_dict(paper.state_dict())
    x = image(2, 3, 16, 16)
    assert (paper(x) - quirk(x)).abs().max() > 1e-3


def test_layer_masks() -> None:
    """The mask of group 1 drops channel 2 of x_0 and scales x_1, for that group alone."""
    layer = ready(SeqConvLayer(4, 6, 2, bottleneck=False, windowed=True))
    x = image(2, 4, 3, 3)
    masks = [torch.ones(2, 4).double() for _ in range(3)]
    masks[1] = torch.tensor([[0.0, 1, 2, 1], [1, 1, 1, 1]]).double()
    r1, x1 = by_hand(layer.Filters[0], x)
    seen = torch.cat([x[:, 2:4], x1], 1)
    seen[0, 0] = 0
    seen[0, 2] *= 2
    r2, x2 = by_hand(layer.Filters[1], seen)
    r3, x3 = by_hand(layer.Filters[2], torch.cat([x1, x2], 1))
    same(layer(x, masks=masks), [r1, r2, r3], [x1, x2, x3])


@pytest.mark.parametrize(
    "settings", [{}, {"windowed": False}, {"bottleneck": True, "blocks": (1, 2, 1)}], ids=["w", "dense", "b"]
)
def test_network_masks(settings: dict[str, object]) -> None:
    """Unequal windows everywhere: a mask taken out of order would not even have the right shape."""
    net = ready(CifarNet(group_width=8, widen=1, **settings))
    x = image(2, 3, 8, 8)
    ones = [torch.ones(2, c).double() for c in net.mask_channels()]
    stream = iter(ones)
    torch.testing.assert_close(net(x, stream), net(x), rtol=0, atol=0)
    assert next(stream, None) is None, "every mask is taken"
    last = [*ones[:-1], torch.zeros(2, 48).double()]
    blank = net.Blender(torch.zeros(1, 48, 1, 1).double())[1][..., 0, 0]
    torch.testing.assert_close(net(x, last), net.Classifier(blank).expand(2, -1))


def test_randomise() -> None:
    def make() -> CifarNet:
        return CifarNet(group_width=8, widen=1)

    first, again, other = randomise(make(), 5), randomise(make().double(), 5), randomise(make(), 6)
    for name, value in first.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(again.state_dict()[name].float(), value, rtol=0, atol=0)
            assert not torch.equal(other.state_dict()[name], value), name
            assert (value != 0).all() and (value != 1).all(), f"{name} hides an error"


@pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
def test_scale_0_makes_blocks_identities(bottleneck: bool) -> None:
    block = ResidualBlock(6, group_width=2, bottleneck=bottleneck, windowed=True).double()
    randomise(block, 5, layer_b_scale=0.0)
    raw, activated = image(2, 6, 3, 3), image(2, 6, 3, 3, seed=8)
    torch.testing.assert_close(block(raw, activated)[0], raw, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["seqresnet_b22", "seqresnet_r4_k8", "ablation_dense_r3_k8"])
@torch.no_grad()
def test_forward_is_deterministic_and_of_order_1(name: str) -> None:
    x = image(2, 3, 16, 16).float()
    net = getattr(oracle, name)().eval()
    runs = [randomise(net, 1)(x) for _ in range(2)]
    assert torch.equal(*runs)
    assert 0.1 < runs[0].std() < 10
    assert not torch.equal(runs[0][0], runs[0][1]), "the images must make a difference"

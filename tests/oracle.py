"""The test oracle: the paper's networks, restated literally and slowly in plain PyTorch, without the library.

Group i (from 0) of a layer sees [x_0, x_1, ..., x_i], cut to channels [i*k, i*k + C) if windowed:
raw_i = conv(seen) (+ shortcut_i), x_{i+1} = relu(bn(raw_i)). Every part returns (raw, activated).
The state_dict has the published checkpoints' names; hence attributes that break Python's naming habits.
A fresh network holds PyTorch's default values: call `randomise`, so that no zero and no one hides an error.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]  # raw (before BN and ReLU), activated (after both)
Settings = Sequence[int]  # one value a stage
Masks = Iterable[Tensor] | None


class Unit(nn.Module):
    """Convolution without bias, optional shortcut, BatchNorm, ReLU; the shortcut is part of raw."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.LinearLayer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.BatchNormalizationLayer = nn.BatchNorm2d(c_out, eps=1e-5, momentum=0.1)
        self.Activation = nn.ReLU()  # stateless; a module only so that the FLOPs count can hook it

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Pair:
        raw = self.LinearLayer(x) if shortcut is None else self.LinearLayer(x) + shortcut
        return raw, self.Activation(self.BatchNormalizationLayer(raw))


class SeqConvLayer(nn.Module):
    """Sequential aggregation. naming: 'filters' (Filters.i...) or 'split' (BottleneckLayers.i, ...)."""

    def __init__(
        self, in_channels: int, out_channels: int, group_width: int, bottleneck: bool, windowed: bool,
        subgroups: int = 1, naming: str = "filters",
    ):  # fmt: skip
        super().__init__()
        if out_channels % group_width:
            raise ValueError(f"{out_channels} channels do not divide into groups of {group_width}")
        if not bottleneck and (subgroups != 1 or naming != "filters"):
            raise ValueError("subgroups and split names exist only for bottleneck layers")
        k = group_width
        self.in_channels, self.group_width, self.windowed = in_channels, k, windowed
        # The number of channels that each group sees.
        self.windows = [in_channels + (0 if windowed else i * k) for i in range(out_channels // k)]
        # groups: each group's units, in a plain list, so that only the checkpoints' names are registered.
        if not bottleneck:
            self.groups = [[Unit(w, k, 3)] for w in self.windows]
            self.Filters = nn.ModuleList(unit for (unit,) in self.groups)
            return
        self.groups = [[Unit(w, k, 1), Unit(k, k, 3, groups=subgroups)] for w in self.windows]
        first, last = zip(*self.groups, strict=True)
        if naming == "split":
            self.BottleneckLayers, self.TransformationLayers = nn.ModuleList(first), nn.ModuleList(last)
        else:
            names = ("BottleneckLayer", "TransformationLayer")
            self.Filters = nn.ModuleList(nn.ModuleDict(zip(names, g, strict=True)) for g in self.groups)

    def forward(self, x: Tensor, shortcut: Tensor | None = None, masks: Masks = None) -> Pair:
        """masks: one [N, window] factor a group, in order; an iterator is advanced by exactly that many."""
        masks = None if masks is None else iter(masks)
        k = self.group_width
        raws, outputs = [], []
        for i, (*first, last) in enumerate(self.groups):
            seen = torch.cat([x, *outputs], dim=1)
            if self.windowed:
                seen = seen[:, i * k : i * k + self.in_channels]
            if masks is not None:
                seen = seen * next(masks)[:, :, None, None]
            for unit in first:
                _, seen = unit(seen)
            raw, activated = last(seen, None if shortcut is None else shortcut[:, i * k : (i + 1) * k])
            raws, outputs = [*raws, raw], [*outputs, activated]
        return torch.cat(raws, dim=1), torch.cat(outputs, dim=1)


class ResidualBlock(nn.Module):
    """B(A(activated)) with the incoming raw added inside B's groups, so later groups of B see the sum."""

    def __init__(self, channels: int, **layer):
        super().__init__()
        self.LayerA = SeqConvLayer(channels, channels, **layer)
        self.LayerB = SeqConvLayer(channels, channels, **layer)

    def forward(self, raw: Tensor, activated: Tensor, masks: Masks = None) -> Pair:
        masks = None if masks is None else iter(masks)
        _, middle = self.LayerA(activated, masks=masks)
        return self.LayerB(middle, shortcut=raw, masks=masks)


class Downsample(nn.Module):
    """[input, extension] -> 3x3 conv, stride 2, in `shrink` = C'/k' * s' groups (k', s' of the NEXT stage).

    `layer` describes the extension, with the k and s of the stage that is left.
    repeat_extension=True is the quirk of the published SeqResNeXt-24 code: [extension, extension]."""

    def __init__(self, in_channels: int, out_channels: int, shrink: int, repeat_extension=False, **layer):
        super().__init__()
        self.repeat_extension = repeat_extension
        self.ExtensionLayer = SeqConvLayer(in_channels, out_channels - in_channels, **layer)
        self.ShrinkingLayer = Unit(out_channels, out_channels, 3, stride=2, groups=shrink)

    def forward(self, x: Tensor, masks: Masks = None) -> Pair:
        _, extension = self.ExtensionLayer(x, masks=masks)
        return self.ShrinkingLayer(torch.cat([extension if self.repeat_extension else x, extension], dim=1))


class Network(nn.Module):
    """What both families share: stages, down-sampling between them, 1x1 conv, pooling, classifier."""

    def __init__(self, settings: Sequence[Settings], num_classes: int, repeat_extension=False, **layer):
        super().__init__()
        stages = list(zip(*settings, strict=True))
        self.stages = len(stages)
        for n, (c, k, s, depth) in enumerate(stages, start=1):
            this = {"group_width": k, "subgroups": s, **layer}
            self.add_module(f"Stage{n}", nn.ModuleList(ResidualBlock(c, **this) for _ in range(depth)))
            if n < len(stages):
                c_next, k_next, s_next, _ = stages[n]
                shrink = c_next // k_next * s_next
                self.add_module(f"Downsample{n}", Downsample(c, c_next, shrink, repeat_extension, **this))
        self.Blender = Unit(c, c, 1)
        self.Classifier = nn.Linear(c, num_classes)

    def finish(self, raw: Tensor, activated: Tensor, masks: Iterator[Tensor] | None = None) -> Tensor:
        for n in range(1, self.stages + 1):
            if n > 1:
                raw, activated = getattr(self, f"Downsample{n - 1}")(activated, masks)
            for block in getattr(self, f"Stage{n}"):
                raw, activated = block(raw, activated, masks)
        if masks is not None:
            activated = activated * next(masks)[:, :, None, None]
        return self.Classifier(self.Blender(activated)[1].mean(dim=(2, 3)))


class ImageNetNet(Network):
    """Stem to 112 px, dense layer, four stages from 56 px; bottleneck layers throughout."""

    def __init__(
        self, channels: Settings, group_widths: Settings, subgroups: Settings, blocks: Settings,
        naming: str = "filters", num_classes: int = 1000, in_chans: int = 3, repeat_extension: bool = False,
    ):  # fmt: skip
        layer = {"bottleneck": True, "windowed": True, "naming": naming}
        super().__init__((channels, group_widths, subgroups, blocks), num_classes, repeat_extension, **layer)
        c, k, s = channels[0], group_widths[0], subgroups[0]
        self.Head0 = Unit(in_chans, 32, 3, stride=2)
        self.Head1 = Unit(32, 32, 3)
        self.Head2 = SeqConvLayer(32, c, k, bottleneck=True, windowed=False, subgroups=s, naming=naming)
        self.ShrinkingLayer = Unit(c, c, 3, stride=2, groups=c // k * s)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Head2(self.Head1(self.Head0(x)[1])[1])[1]
        return self.finish(*self.ShrinkingLayer(x))


class CifarNet(Network):
    """Three stages of 16r, 32r, 48r channels (r = widen), one group width.

    windowed=False makes EVERY layer dense, the down-sampling blocks' extensions too: only so does the
    ablation r=3, k=8, blocks 1 2 1 have its 1,229,658 parameters (test_oracle.py shows the alternatives)."""

    def __init__(self, group_width, widen, blocks=(1, 1, 1), bottleneck=False, windowed=True, num_classes=10):
        channels = [16 * widen * n for n in (1, 2, 3)]
        layer = {"bottleneck": bottleneck, "windowed": windowed}
        super().__init__((channels, [group_width] * 3, [1] * 3, blocks), num_classes, **layer)
        self.Init = Unit(3, 16, 3)
        self.Head = SeqConvLayer(16, channels[0], group_width, bottleneck, windowed=False)

    def mask_channels(self) -> list[int]:
        """Channels of every mask that forward takes, in order: each group's but Head's, then Blender's."""
        layers = [part for part in self.modules() if isinstance(part, SeqConvLayer) and part is not self.Head]
        return [w for layer in layers for w in layer.windows] + [self.Classifier.in_features]

    def forward(self, x: Tensor, masks: Masks = None) -> Tensor:
        return self.finish(*self.Head(self.Init(x)[1]), None if masks is None else iter(masks))


seqresnet_b = partial(ImageNetNet, (128, 256, 512, 1024), (32, 64, 64, 128), (1, 1, 1, 1))
seqresnet_b22 = partial(seqresnet_b, (1, 1, 2, 1))
seqresnet_b42 = partial(seqresnet_b, (3, 4, 5, 3))
seqresnext = partial(ImageNetNet, (256, 512, 1024, 2048), (32, 64, 64, 128), (8, 8, 4, 4), naming="split")
seqresnext_24 = partial(seqresnext, (1, 1, 3, 1))
# CIFAR, named by widening factor r and group width k.
seqresnet_r4_k8 = partial(CifarNet, group_width=8, widen=4)
seqresnet_r10_k8 = partial(CifarNet, group_width=8, widen=10)
seqresnet_b_r7_k16 = partial(CifarNet, group_width=16, widen=7, bottleneck=True)
seqresnet_b_r20_k32 = partial(CifarNet, group_width=32, widen=20, bottleneck=True)
ablation_dense_r3_k8 = partial(CifarNet, group_width=8, widen=3, blocks=(1, 2, 1), windowed=False)
ablation_r4_k16 = partial(CifarNet, group_width=16, widen=4)
ablation_r3_k16 = partial(CifarNet, group_width=16, widen=3, blocks=(1, 2, 2))


@torch.no_grad()
def randomise(module: nn.Module, seed: int, layer_b_scale: float = 1.0) -> nn.Module:
    """Random weights, BN affine and running statistics, equal for every device and dtype up to rounding.

    layer_b_scale multiplies the last conv of every group of every block's layer B (0 = the paper's start)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            draw(part.weight, 0.5, 1.5)
            draw(part.running_var, 0.5, 1.5)
            draw(part.bias, -0.5, 0.5)
            draw(part.running_mean, -0.5, 0.5)
        elif isinstance(part, nn.Conv2d | nn.Linear):
            # Variance 1.5/fan_in, not 2: the random BNs amplify, and groups chain up hundreds deep.
            bound = (3 * 1.5 / part.weight[0].numel()) ** 0.5
            draw(part.weight, -bound, bound)
            if part.bias is not None:
                draw(part.bias, -0.5, 0.5)
    for block in (part for part in module.modules() if isinstance(part, ResidualBlock)):
        for *_, last in block.LayerB.groups:
            last.LinearLayer.weight.mul_(layer_b_scale)
    return module


def count_operations(model: nn.Module, input_size: Sequence[int]) -> dict[type, int]:
    """For one image [C, H, W]: multiply-adds of convs and linears, outputs of BNs and ReLUs."""
    model = copy.deepcopy(model).to("meta").eval()
    counts = dict.fromkeys((nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU), 0)

    def hook(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        fan_in = part.weight[0].numel() if isinstance(part, nn.Conv2d | nn.Linear) else 1
        counts[type(part)] += output.numel() * fan_in

    for part in (part for part in model.modules() if type(part) in counts):
        part.register_forward_hook(hook)
    model(torch.empty(1, *input_size, device="meta"))
    return counts


def conv_macs(model: nn.Module, input_size: Sequence[int], classifier: bool = False) -> int:
    counts = count_operations(model, input_size)
    return counts[nn.Conv2d] + classifier * counts[nn.Linear]


def paper_gflops(model: nn.Module, input_size: Sequence[int]) -> float:
    """The divisor is certain, the split 2 (BN) + 3 (ReLU) is not; the classifier is left out."""
    counts = count_operations(model, input_size)
    return (counts[nn.Conv2d] + 2 * counts[nn.BatchNorm2d] + 3 * counts[nn.ReLU]) / 2**30

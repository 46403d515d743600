"""Small networks of the structures that `convert` is made for, each as torchvision or timm would write it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.interop.convert import ConversionReport


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


def converted(name: str) -> tuple[nn.Module, ConversionReport]:
    return sct.convert(BACKBONES[name](), REPLACED[name][1])

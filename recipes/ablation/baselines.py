"""Networks of other families beside which ours is shown, sized to a number of parameters.

DenseNet-BC: Huang et al., "Densely connected convolutional networks", 2017. Wide ResNet: Zagoruyko and Komodakis,
"Wide residual networks", 2016: pre-activation ResNets (training/baseline.py) of few and wide blocks.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.training.baseline import PreactivationResNet, count_parameters, he_initialise, matching_widths


class DenseLayer(nn.Module):
    """BN-ReLU-1×1 conv to 4·growth channels, BN-ReLU-3×3 conv to growth; the output joins the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] → [N, in_channels + growth, H, W]."""
        inner = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(inner)))], dim=1)


class Transition(nn.Module):
    """BN-ReLU-1×1 conv to half the channels, mean over 2×2 pixels."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """3×3 conv, three dense blocks of `layers` layers with transitions between, BN-ReLU, mean, classifier."""

    def __init__(self, growth: int, layers: int, stem_channels: int, *, num_classes: int, in_chans: int) -> None:
        super().__init__()
        channels = stem_channels
        parts: list[nn.Module] = [nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)]
        for block in range(3):
            if block > 0:
                parts.append(Transition(channels))
                channels //= 2
            for _ in range(layers):
                parts.append(DenseLayer(channels, growth))
                channels += growth
        self.features = nn.Sequential(*parts)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] to logits [N, num_classes]."""
        return self.classifier(F.relu(self.norm(self.features(x))).mean((2, 3)))


def densenet_of_size(target: int, layers: int, *, num_classes: int, in_chans: int) -> DenseNet:
    """The DenseNet whose growth and stem (the paper's: 2·growth) come closest to `target` parameters."""

    def build(growth: int, stem: int) -> DenseNet:
        return DenseNet(growth, layers, stem, num_classes=num_classes, in_chans=in_chans)

    def parameters(growth: int, stem: int) -> int:
        with torch.device("meta"):
            return count_parameters(build(growth, stem))

    above = bisect_left(range(2, 512), target, key=lambda growth: parameters(growth, 2 * growth)) + 2
    candidates = []
    for growth in (above - 1, above):
        stems = range(growth, 3 * growth + 1)
        place = bisect_left(stems, target, key=partial(parameters, growth))
        candidates += [(growth, stem) for stem in stems[max(place - 1, 0) : place + 1]]
    return build(*min(candidates, key=lambda pair: abs(parameters(*pair) - target)))


def wide_resnet_of_size(
    target: int, blocks: int, stem_channels: int, *, num_classes: int, in_chans: int
) -> PreactivationResNet:
    """Few and wide blocks behind a thin stem: stages of about w, 2w and 4w channels, closest to `target` parameters."""

    def build(widths: tuple[int, int, int]) -> PreactivationResNet:
        return PreactivationResNet(
            widths, blocks, num_classes=num_classes, in_chans=in_chans, stem_channels=stem_channels
        )

    return build(matching_widths(target, build))

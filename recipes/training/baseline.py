"""The plain network beside which ours is shown: a pre-activation ResNet of the same number of parameters.

He et al., "Identity mappings in deep residual networks", 2016: x + conv(relu(bn(conv(relu(bn(x)))))), three stages of
widths about w, 2w and 4w at full, half and quarter resolution.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PreactivationBlock(nn.Module):
    """Two 3×3 convs, each behind its BN-ReLU, and a shortcut: the identity, or a 1×1 conv where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.project: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.project = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] → [N, out_channels, H/stride, W/stride], raw."""
        activated = F.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(activated)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(activated))))


class PreactivationResNet(nn.Module):
    """3×3 conv, three stages of `blocks` blocks each, BN-ReLU, mean over the image, classifier.

    The first conv gives `stem_channels` channels, by default as many as the first stage has.
    """

    def __init__(
        self,
        widths: tuple[int, int, int],
        blocks: int,
        *,
        num_classes: int,
        in_chans: int,
        stem_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.widths = widths
        channels = widths[0] if stem_channels is None else stem_channels
        self.stem = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        parts: list[nn.Module] = []
        for i, width in enumerate(widths):
            for j in range(blocks):
                parts.append(PreactivationBlock(channels, width, 2 if i > 0 and j == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*parts)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] to logits [N, num_classes]."""
        x = x.contiguous(memory_format=torch.channels_last)
        features = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.classifier(features.mean((2, 3)))


def he_initialise(model: nn.Module) -> None:
    """He et al., 2015: convs normal with variance 2 / fan-out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def matching_widths(target: int, build: Callable[[tuple[int, int, int]], nn.Module]) -> tuple[int, int, int]:
    """The widths (about w, 2w, 4w) with which `build`'s network comes closest to `target` parameters.

    4w runs over all integers, so that neighbours differ by some 150/w percent only.
    """

    def widths(last: int) -> tuple[int, int, int]:
        return (-(-last // 4), -(-last // 2), last)

    def parameters(last: int) -> int:
        with torch.device("meta"):
            return count_parameters(build(widths(last)))

    candidates = range(4, 4096)
    above = bisect_left(candidates, target, key=parameters)
    nearest = candidates[max(above - 1, 0) : above + 1]
    return widths(min(nearest, key=lambda last: abs(parameters(last) - target)))

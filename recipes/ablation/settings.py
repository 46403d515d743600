"""What is compared: the rows of the paper's Table 5 and baselines of equal size, and the recipe for each data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from recipes.ablation.baselines import densenet_of_size, wide_resnet_of_size
from recipes.training.baseline import PreactivationResNet, count_parameters, matching_widths
from recipes.training.recipe import Recipe
from seqconv_triton.models.cifar import STEM_CHANNELS, CifarSeqResNet


@dataclass(frozen=True)
class Setting:
    """A data set, its recipe, and the sizes of the networks on it.

    `stem_channels` is the 16 in the paper's widths; group widths scale with it, so that every layer keeps its number
    of groups. `resnet_blocks` and `wide_blocks` are a stage's, `dense_layers` a dense block's.
    """

    data: str
    in_chans: int
    classes: int
    stem_channels: int
    dropout: float
    epochs: int
    batch_size: int
    resnet_blocks: int
    wide_blocks: int
    dense_layers: int

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.epochs, self.batch_size)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


SETTINGS = {
    "digits": Setting("digits", 1, 10, 8, 0.0, 30, 32, resnet_blocks=3, wide_blocks=1, dense_layers=6),
    "cifar10": Setting("cifar10", 3, 10, 16, 0.1, 300, 64, resnet_blocks=9, wide_blocks=2, dense_layers=16),
}


@dataclass(frozen=True)
class Contestant:
    """One row of the table; `paper` is its CIFAR-10+ error there in per cent, and of which network where not of this.

    `options` are CifarSeqResNet's where it is one: enough to build it again.
    """

    key: str
    name: str
    paper: str
    options: Callable[[Setting], dict[str, Any]] | None
    build: Callable[[Setting], nn.Module]


def _seqresnet(
    key: str, name: str, paper: str, r: int, k: int, blocks: tuple[int, int, int], windowed: bool
) -> Contestant:
    def options(setting: Setting) -> dict[str, Any]:
        return {
            "group_width": k * setting.stem_channels // STEM_CHANNELS,
            "widen": r,
            "blocks": list(blocks),
            "windowed": windowed,
            "dropout": setting.dropout,
            "num_classes": setting.classes,
            "in_chans": setting.in_chans,
            "stem_channels": setting.stem_channels,
        }

    return Contestant(key, name, paper, options, lambda setting: CifarSeqResNet(**options(setting)))


def budget(setting: Setting) -> int:
    """The parameters of the paper's windowed network (r = 4, k = 8), which the baselines are sized to."""
    return count_parameters(CONTESTANTS["windowed-r4-k8"].build(setting))


def _resnet(setting: Setting) -> nn.Module:
    def build(widths: tuple[int, int, int]) -> PreactivationResNet:
        blocks, classes, in_chans = setting.resnet_blocks, setting.classes, setting.in_chans
        return PreactivationResNet(widths, blocks, num_classes=classes, in_chans=in_chans)

    return build(matching_widths(budget(setting), build))


def _densenet(setting: Setting) -> nn.Module:
    return densenet_of_size(
        budget(setting), setting.dense_layers, num_classes=setting.classes, in_chans=setting.in_chans
    )


def _wide_resnet(setting: Setting) -> nn.Module:
    return wide_resnet_of_size(
        budget(setting),
        setting.wide_blocks,
        setting.stem_channels,
        num_classes=setting.classes,
        in_chans=setting.in_chans,
    )


CONTESTANTS = {
    one.key: one
    for one in (
        _seqresnet("windowed-r4-k8", "SeqResNet r=4 k=8, blocks 1 1 1", "4.78", 4, 8, (1, 1, 1), True),
        _seqresnet("dense-r3-k8", "SeqResNet r=3 k=8, blocks 1 2 1, not windowed", "4.90", 3, 8, (1, 2, 1), False),
        _seqresnet("windowed-r4-k16", "SeqResNet r=4 k=16, blocks 1 1 1", "4.99", 4, 16, (1, 1, 1), True),
        _seqresnet("windowed-r3-k16", "SeqResNet r=3 k=16, blocks 1 2 2", "5.15", 3, 16, (1, 2, 2), True),
        Contestant("resnet", "pre-activation ResNet", "4.62 (ResNet-1001, 10.2 M)", None, _resnet),
        Contestant("densenet", "DenseNet-BC", "4.51 (0.8 M)", None, _densenet),
        Contestant("wide-resnet", "wide ResNet", "4.17 (WRN-28-10, 36.5 M)", None, _wide_resnet),
    )
}

"""The ImageNet networks of the paper's Table 2: SeqResNet-B22, SeqResNet-B42 and SeqResNeXt-24."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from seqconv_triton.models.backbone import Backbone
from seqconv_triton.nn.layers import Stage
from seqconv_triton.nn.stem import StemConv2d
from seqconv_triton.plan import Plan, Tail

STEM_CHANNELS = 32


class StageRow(NamedTuple):
    """One stage of Table 2."""

    channels: int
    group_width: int
    subgroups: int
    blocks: int

    def downsizing(self, repeats: int = 1) -> Tail:
        """The 3×3 conv, stride 2, that leads into this stage and never mixes features of two of its groups."""
        return Tail(self.channels, 3, 2, self.channels // self.group_width * self.subgroups, repeats)


class ImageNetNetwork(Backbone):
    """Stem to a quarter of the image size, four stages of bottleneck blocks, 1×1 conv, classifier.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        repeat_extension: the down-sampling blocks read [extension, extension] instead of [input, extension], as the
            published SeqResNeXt-24 does; only a checkpoint of it needs that.
    """

    rows: ClassVar[tuple[StageRow, ...]]
    published_classes = (1000,)

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        repeat_extension: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        first, last = self.rows[0], self.rows[-1]
        stem = nn.Sequential(
            StemConv2d(in_chans, STEM_CHANNELS, stride=2, **where),
            nn.BatchNorm2d(STEM_CHANNELS, **where),
            nn.ReLU(),
            StemConv2d(STEM_CHANNELS, STEM_CHANNELS, **where),
            # The dense first layer at half the image size, and the downsizing conv behind it.
            Stage(
                Plan.stage(
                    first.channels,
                    first.group_width,
                    blocks=0,
                    entry_channels=STEM_CHANNELS,
                    subgroups=first.subgroups,
                    tail=first.downsizing(),
                ),
                **where,
            ),
        )
        stages = []
        for row, following in zip(self.rows, (*self.rows[1:], None), strict=True):
            plan = Plan.stage(
                row.channels,
                row.group_width,
                row.blocks,
                extension=following.channels - row.channels if following else 0,
                subgroups=row.subgroups,
                tail=following.downsizing(2 if repeat_extension else 1) if following else Tail(last.channels, 1),
            )
            stages.append(Stage(plan, **where))
        super().__init__(stem, stages, num_classes, stem_reduction=4)


class SeqResNetB22(ImageNetNetwork):
    """SeqResNet-B22: 11.8 M parameters, 23.67 % top-1 error in the paper."""

    rows = (StageRow(128, 32, 1, 1), StageRow(256, 64, 1, 1), StageRow(512, 64, 1, 2), StageRow(1024, 128, 1, 1))


class SeqResNetB42(ImageNetNetwork):
    """SeqResNet-B42: 25.6 M parameters, 22.06 % top-1 error in the paper (ResNet-152: 60.2 M, 22.16 %)."""

    rows = (StageRow(128, 32, 1, 3), StageRow(256, 64, 1, 4), StageRow(512, 64, 1, 5), StageRow(1024, 128, 1, 3))


class SeqResNeXt24(ImageNetNetwork):
    """SeqResNeXt-24: 26.2 M parameters, 21.92 % top-1 error in the paper."""

    rows = (StageRow(256, 32, 8, 1), StageRow(512, 64, 8, 1), StageRow(1024, 64, 4, 3), StageRow(2048, 128, 4, 1))

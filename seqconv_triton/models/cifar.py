"""The CIFAR networks of the paper's Table 1: stages of widths 16r, 32r and 48r on 32×32 images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from seqconv_triton.models.backbone import Backbone
from seqconv_triton.nn.layers import Stage
from seqconv_triton.nn.stem import StemConv2d
from seqconv_triton.plan import Plan, Tail

STEM_CHANNELS = 16


class CifarSeqResNet(Backbone):
    """3×3 conv, a dense first layer, three stages of residual blocks, 1×1 conv, classifier.

    The dense first layer (16 → 16r) shares the first stage's buffer: there is no down-sampling between them.

    Args:
        group_width: k, channels per group in every layer; divides 16·widen and the other widths.
        widen: r; the stages have 16r, 32r and 48r channels.
        blocks: residual blocks of each stage.
        bottleneck: a 1×1 conv in front of every group's 3×3 conv (SeqResNet-B).
        windowed: False gives every group of a layer all that went before it (the paper's ablation).
        dropout: probability with which whole channels of what a group sees are dropped in training.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        stem_channels: the 16 of all these widths; another number scales the whole network, group_width excepted.
    """

    published_classes = (10, 100)
    image_size = 32

    def __init__(
        self,
        group_width: int,
        widen: int,
        blocks: Sequence[int] = (1, 1, 1),
        *,
        bottleneck: bool = False,
        windowed: bool = True,
        dropout: float = 0.1,
        num_classes: int = 10,
        in_chans: int = 3,
        stem_channels: int = STEM_CHANNELS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(blocks) != 3 or min(blocks) < 1:
            raise ValueError(f"blocks ({tuple(blocks)}) must be three numbers of at least 1, one a stage")
        if group_width < 1:
            raise ValueError(f"group_width ({group_width}) must be at least 1")
        if widen < 1:
            raise ValueError(f"widen ({widen}) must be at least 1")
        if stem_channels < 1:
            raise ValueError(f"stem_channels ({stem_channels}) must be at least 1")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [stem_channels * widen * factor for factor in (1, 2, 3)]
        stem = nn.Sequential(StemConv2d(in_chans, stem_channels, **where))
        stages = []
        for i, channels in enumerate(widths):
            following = widths[i + 1] if i < 2 else None
            plan = Plan.stage(
                channels,
                group_width,
                blocks[i],
                entry_channels=stem_channels if i == 0 else None,
                extension=following - channels if following else 0,
                bottleneck=bottleneck,
                windowed=windowed,
                tail=Tail(following, 3, 2, following // group_width) if following else Tail(channels, 1),
            )
            stages.append(Stage(plan, dropout=dropout, **where))
        super().__init__(stem, stages, num_classes, stem_reduction=1)

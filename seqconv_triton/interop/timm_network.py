"""The paper's networks with the whole of timm's model interface; their parameters and state dict keys are the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from seqconv_triton.models.backbone import Backbone, chosen_stages
from seqconv_triton.models.cifar import CifarSeqResNet
from seqconv_triton.models.imagenet import SeqResNetB22, SeqResNetB42, SeqResNeXt24
from seqconv_triton.nn.computed import refuse_computed
from seqconv_triton.nn.frozen_trial import twin
from seqconv_triton.nn.layers import Stage
from seqconv_triton.nn.norm import Affine

POOLS = ("", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")


class TimmNetwork(Backbone):
    """What timm expects of a model beyond `Backbone`: pooling, dropout, pruning to features, parameter groups.

    Args:
        args, options: those of the network itself.
        in_chans: channels of the images.
        global_pool: timm's pooling by name; with num_classes=0, "" leaves the features [N, num_features, h, w].
        drop_rate: dropout in front of the classifier, in training.
    """

    def __init__(
        self, *args: Any, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0, **options: Any
    ) -> None:
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate ({drop_rate}) must be at least 0 and below 1")
        self.pool_type = global_pool
        options["in_chans"] = in_chans
        super().__init__(*args, **options)
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.head_drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits, or to the pooled features in front of the classifier."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.classifier(x)

    def get_classifier(self, name_only: bool = False) -> Any:
        """The classifier, or its name."""
        return "classifier" if name_only else self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier, and another pooling unless that is None; 0 classes leave what the pooling gives.

        A classifier needs a pooling: a model that lost its own takes "avg" with it. Raises ValueError where
        `global_pool` asks for none beside a classifier.
        """
        lost = "global_pool" in self._modules and not self.pool_type and num_classes > 0
        pool_type = global_pool if global_pool is not None else "avg" if lost else self.pool_type
        if pool_type not in POOLS:
            raise ValueError(f"global_pool ({pool_type!r}) must be one of {', '.join(map(repr, POOLS))}")
        if not pool_type and num_classes > 0:
            raise ValueError(
                f"global_pool ('') leaves feature maps, which a classifier of {num_classes} classes cannot take; give "
                "num_classes=0, or a pooling"
            )
        self.pool_type = pool_type
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type)).train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        super().reset_classifier(num_classes)
        self.classifier.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Activated features of chosen stages, and (unless `intermediates_only`) the last features before them.

        A stage's features have their own BN behind them; with `norm` the last stage's are the last features, behind
        the 1×1 conv and the network's BN. Features come in the order of `indices`. Raises ValueError for another
        `output_fmt`, and for a stage that does not exist.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt ({output_fmt!r}) must be 'NCHW'")
        count = len(self.stages)
        chosen = chosen_stages(indices, count)
        if not norm or count - 1 not in chosen:
            return super().forward_intermediates(
                x, indices, stop_early=stop_early, intermediates_only=intermediates_only
            )
        last, features = super().forward_intermediates(x, indices)
        features = [last if i == count - 1 else feature for i, feature in zip(chosen, features, strict=True)]
        return features if intermediates_only else (last, features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features of these stages do not need, and return the stages' indices, counted from 0.

        Everything behind the last of them goes; with `prune_norm`, behind the last stage also the 1×1 conv and its
        BN. The kept stage ends in its last block: no parameter is left without a gradient.
        """
        taken = chosen_stages(indices, len(self.stages))
        last = max(taken)
        shortened = last + 1 < len(self.stages)
        if shortened or prune_norm:
            final = self.stages[last]
            assert isinstance(final, Stage)
            self.stages = nn.ModuleList([*list(self.stages)[:last], features_alone(final)])
            self.norm = nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
        if shortened or prune_norm or prune_head:
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns for timm's layer-wise learning rates: stem, then stages (a stage's blocks share their tensors)."""
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """No names: use `seqconv_triton.parameter_groups`, since rules by dimension also spare flat conv weights."""
        return set()


@torch.no_grad()
def features_alone(stage: Stage) -> Stage:
    """A copy of a stage that ends in the activated features of its last block: without extension and tail.

    Its BNs are of the same kinds, in the same mode. Raises ValueError for a stage that is folded, or whose weights are
    computed.
    """
    plan = stage.plan
    if isinstance(stage.norm, Affine):
        raise ValueError("the stage is folded: prune before folding (fuse)")
    for module in (stage, stage.norm, stage.reduce_norm):
        if module is not None:
            refuse_computed(type(module).__name__, module, "be shortened")
    blocks = 1 + max(i for i, layer in enumerate(plan.layers) if layer.entry or layer.residual)
    short = dataclasses.replace(
        plan, layers=plan.layers[:blocks], read_channels=plan.layers[blocks - 1].out_channels, tail=None
    )
    new, shapes = twin(stage), Stage(short, device="meta")
    new.plan, new.mask_columns = short, shapes.mask_columns
    # Groups lie one behind the other in every packed tensor, and those of the blocks come first.
    for name in stage._parameters:
        like = getattr(shapes, name)
        new._parameters[name] = None if like is None else _beginning(stage.get_parameter(name), like.shape)
    new.norm = _shortened(stage.norm, short.normalized_channels)
    if stage.reduce_norm is not None:
        new.reduce_norm = _shortened(stage.reduce_norm, len(short.groups) * short.group_width)
    return new


def _shortened(norm: nn.Module, channels: int) -> nn.Module:
    """A BN of the same kind and mode over the first channels."""
    new = twin(norm)
    for name, parameter in norm._parameters.items():
        new._parameters[name] = None if parameter is None else _beginning(parameter, (channels,))
    for name, buffer in norm._buffers.items():
        if buffer is not None:  # the counter has no dimension
            new._buffers[name] = (buffer[:channels] if buffer.dim() else buffer).clone()
    if hasattr(norm, "num_features"):
        new.__dict__["num_features"] = channels
    return new


def _beginning(whole: nn.Parameter, shape: Sequence[int]) -> nn.Parameter:
    begin = whole.flatten()[: math.prod(shape)].view(*shape).clone()
    return nn.Parameter(begin, requires_grad=whole.requires_grad)


class TimmSeqResNetB22(TimmNetwork, SeqResNetB22): ...


class TimmSeqResNetB42(TimmNetwork, SeqResNetB42): ...


class TimmSeqResNeXt24(TimmNetwork, SeqResNeXt24): ...


class TimmCifarSeqResNet(TimmNetwork, CifarSeqResNet): ...

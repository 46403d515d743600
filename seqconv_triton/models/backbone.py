"""What the paper's networks share: stem, stages, last BN, pooling, classifier; timm's conventions around them."""

# Annotations are not postponed: torch.fx copies those of a forward, and cannot pickle them as text.
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqconv_triton.nn.classifier import PublishedClassifier
from seqconv_triton.nn.layers import PackedSeqConv, Stage, laid_out_like, with_gradient_like
from seqconv_triton.nn.leaf import leaf, refuse_script
from seqconv_triton.nn.stem import StemConv2d
from seqconv_triton.nn.watched import has_other_forward
from seqconv_triton.ops.checks import check_images
from seqconv_triton.ops.stage import autocast_dtype


class Backbone(nn.Module):
    """stem → stages → BN → ReLU → mean over the image → classifier.

    The stem and every stage give raw features: the BN-ReLU of what a stage reads belongs to that stage. The last
    stage ends in the paper's 1×1 conv, whose BN is `norm`. `feature_info` lists channels and reduction of each stage.
    """

    published_classes: ClassVar[tuple[int, ...]] = ()
    image_size: ClassVar[int] = 224  # pixels, the side of the paper's images
    __prepare_scriptable__ = refuse_script

    def __init__(self, stem: nn.Sequential, stages: Sequence[Stage], num_classes: int, stem_reduction: int) -> None:
        super().__init__()
        self.norm: nn.Module
        self.classifier: nn.Module
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.num_features = self.head_hidden_size = stages[-1].plan.out_channels
        tail = stages[-1].tail_weight
        assert tail is not None
        self.norm = nn.BatchNorm2d(self.num_features, stages[-1].eps, device=tail.device, dtype=tail.dtype)
        self.relu = nn.ReLU()
        self.feature_info: list[dict[str, Any]] = []
        reduction = stem_reduction
        for i, stage in enumerate(stages):
            start, stop = stage.feature_channels
            self.feature_info.append({"num_chs": stop - start, "reduction": reduction, "module": f"stages.{i}"})
            reduction *= stage.plan.tail.stride if stage.plan.tail is not None else 1
        self.reset_classifier(num_classes)
        if num_classes in self.published_classes and isinstance(self.classifier, nn.Linear):
            self.classifier = PublishedClassifier.of(self.classifier)
        for module in stem.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] to logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last activated features [N, num_features, h, w], in the memory format of the images."""
        images, x = x, self.forward_stem(x)
        for stage in self.stages:
            x = stage(x)
        return laid_out_like(images, self.relu(self.norm(x)))

    def forward_stem(self, x: Tensor) -> Tensor:
        first = self.stem[0]
        # What a user puts in the first conv's place, an adapter around it, checks its input itself; and weights may
        # come with the conv's forward.
        weight = None
        if isinstance(first, StemConv2d) and not (first._forward_pre_hooks or has_other_forward(first)):
            weight = first.weight
        out: Tensor = self.stem(network_input(x, weight))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits, or to the pooled features [N, num_features] in front of the classifier."""
        x = x.mean((2, 3))
        return x if pre_logits else self.classifier(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        stop_early: bool = False,
        intermediates_only: bool = False,
    ) -> Any:
        """Activated features of chosen stages (all; an int: the last so many; a list: those).

        Returns (last features, list), or the list alone; with `stop_early` nothing behind the last chosen stage is
        computed, and its features are the last. All are in the memory format of the images; channels-last spares a
        copy. Raises ValueError for a stage that does not exist.
        """
        count = len(self.stages)
        chosen = chosen_stages(indices, count)
        taken = {}
        images, x = x, self.forward_stem(x)
        stages: list[Any] = list(self.stages)[: max(chosen) + 1 if stop_early else count]
        for i, stage in enumerate(stages):  # which may be wrapped
            if i in chosen and stage.plan.tail is None:
                x = taken[i] = stage(x)
            elif i in chosen:
                x, taken[i] = stage(x, features=True)
            else:
                x = stage(x)
        taken = {i: laid_out_like(images, features) for i, features in taken.items()}
        features = [taken[i] for i in chosen]
        if intermediates_only:
            return features
        last = laid_out_like(images, self.relu(self.norm(x))) if len(stages) == count else taken[max(chosen)]
        return last, features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Gradient checkpointing: the 1×1 convs' outputs are not kept for backward, but computed again."""
        for module in self.modules():
            if isinstance(module, PackedSeqConv):
                module.recompute = enable

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier for other classes, as nn.Linear starts; 0 leaves the pooled features as they are.

        The constructor gives the paper's numbers of classes the published start (`PublishedClassifier`).
        """
        if num_classes < 0:
            raise ValueError(f"num_classes ({num_classes}) must be at least 0")
        self.num_classes = num_classes
        if num_classes == 0:
            self.classifier = nn.Identity()
            return
        weight = next(self.parameters())
        self.classifier = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)


@leaf
def network_input(x: Tensor, weight: Tensor | None) -> Tensor:
    """Images as the stages want them, channels-last, if they fit the first conv's weight."""
    if weight is not None:
        check_images("x", x, weight.shape[1])
        if x.device != weight.device and not weight.is_meta:  # offloaded weights come with the conv's forward
            raise ValueError(f"x is on {x.device} but the model is on {weight.device}; move both to one device")
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            raise TypeError(f"x is {x.dtype} but the model is {weight.dtype}; cast one of them, or use torch.autocast")
    return with_gradient_like(x).contiguous(memory_format=torch.channels_last)


def chosen_stages(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Which of `count` stages are meant: all, the last so many, or those listed (negative ones from the end)."""
    wanted = f"must name stages 0 to {count - 1}, negative ones from the end, or be a number of last ones to {count}"
    if isinstance(indices, Integral) and not isinstance(indices, bool):
        if not 1 <= indices <= count:
            raise ValueError(f"indices ({indices}) {wanted}")
        return list(range(count))[-int(indices) :]
    if not isinstance(indices, Iterable | None):
        raise TypeError(f"indices must be an int, several, or None, not {type(indices).__name__}")
    chosen = list(range(count) if indices is None else indices)
    if not chosen or not all(isinstance(i, Integral) and -count <= i < count for i in chosen):
        raise ValueError(f"indices {chosen} {wanted}")
    return [int(i) % count for i in chosen]

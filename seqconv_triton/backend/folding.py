"""A stage's weights for evaluation, BN folded in where nothing lies between a conv and its BN."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend.contract import NormVectors, StageArguments
from seqconv_triton.backend.packing import reduce_matrices, transform_weights
from seqconv_triton.plan import Plan

# (weight, j, scale): group j's weight times its scale, if there is one.
Place = Callable[[Tensor, int, Tensor | None], Tensor]


def scaled(weight: Tensor, j: int, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight * scale


def foldable_groups(plan: Plan) -> frozenset[int]:
    """Groups with nothing between their 3×3 conv and its BN and whose raw output no shortcut passes on."""
    passed_on = {group.residual_start for group in plan.groups}
    return frozenset(
        j for j, group in enumerate(plan.groups) if group.residual_start is None and plan.slot(j) not in passed_on
    )


def folded_groups(stage: StageArguments, added: bool) -> frozenset[int]:
    """`foldable_groups` in a pass; `added`: a shortcut from outside comes between every 3×3 conv and its BN."""
    # `fuse` leaves room for the shortcut that a single layer may be given.
    if added or (stage.statistics == "folded" and stage.plan.is_single_layer):
        return frozenset()
    return foldable_groups(stage.plan)


def scale_and_shift(norm: NormVectors, eps: float) -> tuple[Tensor, Tensor]:
    """With BN(x) = scale·x + shift, of known statistics."""
    if norm.mean is None or norm.var is None:
        return norm.weight, norm.bias
    scale = norm.weight * (norm.var + eps).rsqrt()
    return scale, norm.bias - scale * norm.mean


class GroupWeights(NamedTuple):
    """A group's convs; basic layers have no 1×1 conv."""

    reduce: Tensor | None  # [k, window]
    reduce_shift: Tensor | None  # [k]
    transform: Tensor
    transform_shift: Tensor | None  # None: the raw output is needed, BN follows on its own
    packed: bool = False  # laid out by oneDNN (`aten/packed.py`)


class Folding:
    """`group(j)` folds when it is asked for: in a group's turn its weights are still in the cache.

    `added`: a shortcut from outside comes between every 3×3 conv and its BN. `place` gives weights over windows the
    order in which the caller keeps windows.
    """

    def __init__(self, stage: StageArguments, dtype: torch.dtype, added: bool, place: Place = scaled) -> None:
        self.plan, self.place = stage.plan, place
        plan, k = stage.plan, stage.plan.group_width
        self.done = stage.statistics == "folded"  # by `fuse`
        self.foldable = folded_groups(stage, added)
        scale, shift = (vector.to(dtype) for vector in scale_and_shift(stage.norms.main, stage.eps))
        missing = plan.total_channels - plan.normalized_channels
        # [buffer channels], also of an already activated input, where they are not used.
        self.scale, self.shift = (F.pad(vector, (missing, 0)) if missing else vector for vector in (scale, shift))
        self.reduce = reduce_matrices(stage.convs.reduce, plan)
        self.inner: list[tuple[Tensor, Tensor]] = []
        if stage.norms.inner is not None:
            scales, shifts = (vector.to(dtype).split(k) for vector in scale_and_shift(stage.norms.inner, stage.eps))
            self.inner = list(zip(scales, shifts, strict=True))
        self.transform = transform_weights(stage.convs.transform, plan)

    def group(self, j: int) -> GroupWeights:
        plan, reduce, reduce_shift = self.plan, None, None
        if self.inner:
            reduce_scale, reduce_shift = self.inner[j]
            reduce = self.place(self.reduce[j], j, None if self.done else reduce_scale[:, None])
        factor = transform_shift = None
        if j in self.foldable:
            channels = slice(plan.slot(j), plan.slot(j) + plan.group_width)
            factor = None if self.done else self.scale[channels, None, None, None]
            transform_shift = self.shift[channels]
        over_window = scaled if plan.bottleneck else self.place
        transform = over_window(self.transform[j], j, factor)
        return GroupWeights(reduce, reduce_shift, transform, transform_shift)

"""A stage's weights for evaluation, BN folded in where nothing lies between a conv and its BN."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend.aten.parts import norms, window_rows
from seqconv_triton.backend.contract import StageParameters, Statistics
from seqconv_triton.backend.packing import transform_weights
from seqconv_triton.plan import Plan

# (weight, j, plan, scale): group j's weight times its scale, if there is one.
Place = Callable[[Tensor, int, Plan, Tensor | None], Tensor]


def scaled(weight: Tensor, j: int, plan: Plan, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight * scale


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

    def __init__(
        self,
        parameters: StageParameters,
        statistics: Statistics,
        plan: Plan,
        eps: float,
        dtype: torch.dtype,
        added: bool,
        place: Place = scaled,
    ) -> None:
        self.plan, self.place, k = plan, place, plan.group_width
        self.done = statistics.mean is None  # by `fuse`
        # `fuse` leaves room for the shortcut that a single layer may be given.
        self.foldable = (
            frozenset() if added or (self.done and plan.is_single_layer) else frozenset(plan.foldable_groups)
        )
        norm, reduce_norm = norms(parameters, statistics, eps, batch=False)
        scale, shift = (vector.to(dtype) for vector in norm.fold())
        missing = plan.total_channels - plan.normalized_channels
        # [buffer channels], also of an already activated input, where they are not used.
        self.scale, self.shift = (F.pad(vector, (missing, 0)) if missing else vector for vector in (scale, shift))
        self.reduce = window_rows(parameters.reduce_weight, plan)
        self.reduce_norm: list[tuple[Tensor, Tensor]] = []
        if reduce_norm is not None:
            scales, shifts = (vector.to(dtype).split(k) for vector in reduce_norm.fold())
            self.reduce_norm = list(zip(scales, shifts, strict=True))
        self.transform = transform_weights(parameters.transform_weight, plan)

    def group(self, j: int) -> GroupWeights:
        plan, reduce, reduce_shift = self.plan, None, None
        if self.reduce_norm:
            own, reduce_shift = self.reduce_norm[j]
            reduce = self.place(self.reduce[j], j, plan, None if self.done else own[:, None])
        factor = transform_shift = None
        if j in self.foldable:
            channels = slice(plan.slot(j), plan.slot(j) + plan.group_width)
            factor = None if self.done else self.scale[channels, None, None, None]
            transform_shift = self.shift[channels]
        over_window = scaled if plan.bottleneck else self.place
        transform = over_window(self.transform[j], j, plan, factor)
        return GroupWeights(reduce, reduce_shift, transform, transform_shift)

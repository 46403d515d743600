"""Weights of fused stages as oneDNN lays them out, so that an evaluation does not reorder them again.

Only what `fuse(model, pack=True)` has made is remembered, whose weights are marked: they are meant to stay as they
are. An entry lives as long as the memory of its 3×3 weight, and counts only while every weight is the same tensor in
the same memory and has not changed since, by PyTorch's own count of in-place changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from seqconv_triton.backend.folding import GroupWeights

if TYPE_CHECKING:
    from seqconv_triton.backend.contract import StageArguments
    from seqconv_triton.backend.folding import Folding
    from seqconv_triton.plan import Plan

MARK = "_seqconv_triton_stays"
_remembered = WeakIdKeyDictionary()  # storage of a 3×3 weight → by offset: what it counts for, and the packed groups


def packed(stage: StageArguments, folding: Folding, x: Tensor) -> Callable[[int], GroupWeights]:
    """The groups of `folding`, packed for images like `x`; once for the same weights, other images are only slower."""
    main, inner = stage.norms
    weights = [weight for weight in (*stage.convs, *main, *(inner or ())) if weight is not None]
    # Others may be changed uncounted, and nobody counts changes in inference mode.
    if any(weight.is_inference() or not stays(weight) for weight in weights):
        return folding.group
    key = folding.plan, folding.place, [identity(weight) for weight in weights]
    transform = stage.convs.transform
    entries = _remembered.setdefault(transform.untyped_storage(), {})
    remembered = entries.get(transform.storage_offset())
    if remembered is None or remembered[0] != key:
        remembered = key, [pack(folding.group(j), folding.plan, x) for j in range(len(folding.plan.groups))]
        entries[transform.storage_offset()] = remembered
    groups: list[GroupWeights] = remembered[1]
    return groups.__getitem__


def mark(weight: Tensor) -> None:
    """Say that nobody will change a weight uncounted; copies of it are marked, what is computed from it is not."""
    setattr(weight, MARK, True)


def stays(weight: Tensor) -> bool:
    return hasattr(weight, MARK)


def identity(weight: Tensor) -> tuple[Any, ...]:
    """The weak reference is there because ids and addresses come again when what had them is gone."""
    return WeakIdRef(weight.untyped_storage()), id(weight), weight.data_ptr(), weight._version


def forget() -> None:
    """Free all that is remembered; the next evaluation packs again."""
    _remembered.clear()


def pack(weights: GroupWeights, plan: Plan, x: Tensor) -> GroupWeights:
    images, _, height, width = x.shape

    def packed(weight: Tensor, groups: int) -> Tensor:
        padding, one = [weight.shape[-1] // 2] * 2, [1, 1]
        shape = [images, weight.shape[1] * groups, height, width]
        reordered: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, one, one, groups, shape)
        return reordered

    reduce = None if weights.reduce is None else packed(weights.reduce[:, :, None, None], 1)
    transform = packed(weights.transform, plan.subgroups if plan.bottleneck else 1)
    # No views of parameters: PyTorch swaps none that has any.
    shifts = (None if shift is None else shift.clone() for shift in (weights.reduce_shift, weights.transform_shift))
    reduce_shift, transform_shift = shifts
    return GroupWeights(reduce, reduce_shift, transform, transform_shift, packed=True)


def packed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    """Conv with a packed weight. Without oneDNN's own ReLU, which turns NaN into 0."""
    one: Any = [1, 1]
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, [padding] * 2, one, one, groups, "none", [], ""
    )
    return out

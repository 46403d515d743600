"""Weights of fused stages as oneDNN lays them out, so that an evaluation does not reorder them again.

Only what `fuse` has made is remembered: it is for deployment, where weights stay as they are. An entry lives as long as
its 3×3 weight and counts only while no weight has changed since, by PyTorch's own count of in-place changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from seqconv_triton.backend.aten_parts import onednn_takes

if TYPE_CHECKING:
    from seqconv_triton.backend import StageParameters
    from seqconv_triton.backend.aten_evaluation import Folded
    from seqconv_triton.plan import Plan

_remembered = WeakTensorKeyDictionary()


def remembered(parameters: StageParameters, plan: Plan, eps: float, x: Tensor, fold: Callable[[], Folded]) -> Folded:
    """What `fold` gives, packed for images like `x`; once for the same weights."""
    weights = [weight for weight in parameters if weight is not None]
    if not onednn_takes(x) or not all(weight.is_leaf and not weight.is_inference() for weight in weights):
        return fold()
    key = (plan, eps, [(id(weight), weight.data_ptr(), weight._version) for weight in weights])
    found = _remembered.get(parameters.transform_weight)
    if found is None or found[0] != key:
        found = key, pack(fold(), plan, x)
        _remembered[parameters.transform_weight] = found
    folded: Folded = found[1]
    return folded


def pack(folded: Folded, plan: Plan, x: Tensor) -> Folded:
    """Weights reordered for images like `x`; others are only slower."""
    images, _, height, width = x.shape

    def packed(weight: Tensor, groups: int) -> Tensor:
        area, one = [weight.shape[-1] // 2] * 2, [1, 1]
        shape = [images, weight.shape[1] * groups, height, width]
        reordered: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, area, one, one, groups, shape)
        return reordered

    subgroups = plan.subgroups if plan.bottleneck else 1
    return folded._replace(
        reduce=tuple(packed(weight[:, :, None, None], 1) for weight in folded.reduce),
        transform=tuple(packed(weight, subgroups) for weight in folded.transform),
        packed=True,
    )


def packed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int, then: str) -> Tensor:
    """Conv with a packed weight; `then` is "none" or "relu"."""
    one: Any = [1, 1]
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, [padding] * 2, one, one, groups, then, [], ""
    )
    return out

"""Checks of what a user hands to a stage: every error names the argument, what was given and what is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch

from seqconv_triton.backend.contract import NormVectors, StatisticsMode

if TYPE_CHECKING:
    from torch import Tensor

    from seqconv_triton.backend.contract import Convs, Norms
    from seqconv_triton.plan import Plan

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_images(name: str, x: Tensor, channels: int) -> None:
    """A floating-point [N, channels, H, W] tensor with at least one pixel an image."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} has dtype {x.dtype}; allowed are {allowed}")
    if x.dim() != 4:
        raise ValueError(f"{name} has {x.dim()} dimensions {list(x.shape)}; expected [N, {channels}, H, W]")
    if x.shape[1] != channels:
        raise ValueError(f"{name} has {x.shape[1]} channels {list(x.shape)}; expected [N, {channels}, H, W]")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name} has no pixels {list(x.shape)}; H and W must be at least 1")


def check_stage(
    x: Tensor,
    convs: Convs,
    norms: Norms,
    plan: Plan,
    statistics: StatisticsMode,
    shortcut: Tensor | None,
    mask: Tensor | None,
    process_group: str,
) -> None:
    """What `stage` was handed fits the plan, in shape, dtype and device."""
    if statistics not in get_args(StatisticsMode):
        raise ValueError(f"statistics is {statistics!r}; allowed are {', '.join(get_args(StatisticsMode))}")
    if process_group and x.shape[0] == 0:
        raise ValueError(f"x has no images {list(x.shape)}; synchronised batch statistics need some on every rank")
    if statistics == "batch" and not process_group and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x has one value per channel {list(x.shape)}; batch statistics in training need more")
    appended = len(plan.groups) * plan.group_width
    weights = {
        "reduce_weight": (convs.reduce, plan.reduce_weight_shape),
        "transform_weight": (convs.transform, plan.transform_weight_shape),
        "tail_weight": (convs.tail, plan.tail_weight_shape),
    }
    for name, (weight, shape) in weights.items():
        _check_parameter(name, weight, shape, x)
        if weight is not None and weight.dtype != x.dtype:
            raise TypeError(f"x is {x.dtype} but {name} is {weight.dtype}; cast one of them, or use torch.autocast")
    _check_norm("norm", norms.main, plan.normalized_channels, statistics, x)
    _check_norm("reduce_norm", norms.inner, appended if plan.bottleneck else None, statistics, x)
    if shortcut is not None:
        if not plan.is_single_layer:
            raise ValueError("shortcut is for a single layer; the blocks of a stage have their own")
        check_images("shortcut", shortcut, appended)
        if shortcut.shape != (x.shape[0], appended, x.shape[2], x.shape[3]):
            raise ValueError(f"shortcut has shape {list(shortcut.shape)}; x {list(x.shape)} has other images")
        if shortcut.dtype != x.dtype or shortcut.device != x.device:
            raise TypeError(f"shortcut is {shortcut.dtype} on {shortcut.device}, x {x.dtype} on {x.device}")
    if mask is not None and tuple(mask.shape) != (x.shape[0], plan.mask_channels):
        raise ValueError(f"mask has shape {list(mask.shape)}; the plan needs [{x.shape[0]}, {plan.mask_channels}]")


def _check_norm(
    name: str, norm: NormVectors | None, channels: int | None, statistics: StatisticsMode, x: Tensor
) -> None:
    shape = None if channels is None else (channels,)
    for vector in NormVectors._fields if statistics == "running" else ("weight", "bias"):
        _check_parameter(f"{name}_{vector}", getattr(norm, vector, None), shape, x)


def _check_parameter(name: str, tensor: Tensor | None, wanted: tuple[int, ...] | None, x: Tensor) -> None:
    shape = None if tensor is None else tuple(tensor.shape)
    if shape != wanted:
        raise ValueError(f"{name} has shape {shape}; the plan needs {wanted}")
    if tensor is not None and tensor.device != x.device:
        raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}; move both to one device")

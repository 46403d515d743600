"""Checks of what a user hands to a stage: every error names the argument, what was given and what is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from seqconv_triton.ops.autocast import autocast_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from seqconv_triton.backend.contract import StageParameters, Statistics
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
    parameters: StageParameters,
    plan: Plan,
    statistics: Statistics | None,
    shortcut: Tensor | None,
    mask: Tensor | None,
    process_group: str,
) -> None:
    """What `functional.stage` was given fits the plan, in shape, dtype and device."""
    if process_group and statistics is None and x.shape[0] == 0:
        raise ValueError(f"x has no images {list(x.shape)}; synchronised batch statistics need some on every rank")
    if not process_group and statistics is None and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x has one value per channel {list(x.shape)}; batch statistics in training need more")
    appended = len(plan.groups) * plan.group_width
    norms = appended if plan.bottleneck else None
    shapes: dict[str, tuple[int, ...] | None] = {
        "reduce_weight": plan.reduce_weight_shape,
        "reduce_norm_weight": None if norms is None else (norms,),
        "reduce_norm_bias": None if norms is None else (norms,),
        "transform_weight": plan.transform_weight_shape,
        "norm_weight": (plan.normalized_channels,),
        "norm_bias": (plan.normalized_channels,),
        "tail_weight": plan.tail_weight_shape,
    }
    for name, tensor in zip(parameters._fields, parameters, strict=True):
        given, wanted = None if tensor is None else tuple(tensor.shape), shapes[name]
        if given != wanted:
            raise ValueError(f"{name} has shape {given}; the plan needs {wanted}")
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}; move both to one device")
        if "norm" not in name and tensor.dtype != x.dtype:
            raise TypeError(f"x is {x.dtype} but {name} is {tensor.dtype}; cast one of them, or use torch.autocast")
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


def check_network_input(x: Tensor, weight: Tensor) -> None:
    """Images fit a network's first conv in channels, device and dtype (autocast casts for itself)."""
    check_images("x", x, weight.shape[1])
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} but the model is on {weight.device}; move both to one device")
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise TypeError(f"x is {x.dtype} but the model is {weight.dtype}; cast one of them, or use torch.autocast")

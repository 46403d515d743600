"""Packed weights, and dropout masks, seen as one for each group."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from seqconv_triton.plan import Plan


def window_weights(weight: Tensor, plan: Plan, kernel_size: int) -> tuple[Tensor, ...]:
    """Views [k, window, kernel, kernel] of the packed convs over the windows, one a group."""
    k, groups = plan.group_width, plan.groups
    if plan.uniform:
        return weight.view(len(groups), k, -1, kernel_size, kernel_size).unbind(0)
    sizes = [k * group.window_width * kernel_size**2 for group in groups]
    parts = weight.split(sizes)
    return tuple(part.view(k, -1, kernel_size, kernel_size) for part in parts)


def reduce_matrices(weight: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
    """Views of the 1×1 weights as matrices [k, window], one a group; none in basic layers."""
    return () if weight is None else tuple(w.flatten(1) for w in window_weights(weight, plan, 1))


def transform_weights(weight: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """Views of the 3×3 weights, one a group: [k, k/s, 3, 3], or [k, window, 3, 3] in basic layers."""
    if not plan.bottleneck:
        return window_weights(weight, plan, 3)
    return weight.view(len(plan.groups), plan.group_width, -1, 3, 3).unbind(0)


def group_window(weight: Tensor, plan: Plan, kernel_size: int, j: int) -> Tensor:
    """`window_weights(weight, plan, kernel_size)[j]`, as one slice."""
    k = plan.group_width
    if plan.uniform:
        return weight[j * k : (j + 1) * k].view(k, -1, kernel_size, kernel_size)
    start, stop = (k * kernel_size**2 * sum(group.window_width for group in plan.groups[:n]) for n in (j, j + 1))
    return weight[start:stop].view(k, -1, kernel_size, kernel_size)


def group_transform(weight: Tensor, plan: Plan, j: int) -> Tensor:
    """`transform_weights(weight, plan)[j]`, as one slice."""
    if not plan.bottleneck:
        return group_window(weight, plan, 3, j)
    return weight[j * plan.group_width : (j + 1) * plan.group_width]


def group_masks(mask: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """The columns [N, window] of the dropout mask that belong to each group, and last the tail's if there is one."""
    sizes = [group.window_width for group in plan.groups]
    if plan.tail is not None:
        sizes.append(plan.read_channels)
    return mask.split(sizes, dim=1)

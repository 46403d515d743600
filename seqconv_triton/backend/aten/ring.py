"""The ring of the aten backend: which column a buffer channel lies in, and weights placed to match.

A window lies in the ring without gaps between its rows, as oneDNN wants it, but turned, and perhaps among columns that
the group does not read. Weights over the window follow: turned the same way, with zeros for those columns (so that
an infinite activation there makes the group's pixel NaN, where the reference may be finite; other images are safe).
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqconv_triton.backend.aten.parts import Images, product_over_pixels, worth_onednn
from seqconv_triton.backend.packing import group_masks
from seqconv_triton.plan import Plan

# Where a part lies among some channels, and in which columns of the ring.
Piece = tuple[slice, slice]


def column(channel: int, plan: Plan) -> int:
    """That of a buffer channel; the last ones, which leave the stage, stand in their own order."""
    assert plan.ring_channels is not None
    return (channel - plan.total_channels) % plan.ring_channels


def pieces(start: int, width: int, plan: Plan) -> list[Piece]:
    """The buffer channels [start, start + width), one piece or, around the end of the ring, two."""
    assert plan.ring_channels is not None
    first = column(start, plan)
    before = min(width, plan.ring_channels - first)
    found = [(slice(0, before), slice(first, first + before))]
    if before < width:
        found.append((slice(before, width), slice(0, width - before)))
    return found


def placed(weight: Tensor, j: int, plan: Plan, scale: Tensor | None = None) -> Tensor:
    """What goes with group j's window, channels in dimension 1, times `scale`, in the order of the columns read."""
    group, ring = plan.groups[j], plan.ring_channels
    if ring is None or (reads_all(j, plan) and column(group.window_start, plan) == 0):
        return weight if scale is None else weight * scale
    new = weight.new_empty if reads_all(j, plan) else weight.new_zeros
    out = new((weight.shape[0], ring, *weight.shape[2:]))
    for own, columns in pieces(group.window_start, group.window_width, plan):
        if scale is None:
            out[:, columns] = weight[:, own]
        else:
            torch.mul(weight[:, own], scale, out=out[:, columns])
    return out


def placed_masks(mask: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """`group_masks`, in the order of the columns read; the tail's as it is."""
    masks, count = group_masks(mask, plan), len(plan.groups)
    return tuple(placed(m, j, plan) for j, m in enumerate(masks[:count])) + masks[count:]


def over_columns(j: int, plan: Plan) -> list[Piece]:
    """Parts of group j's window, and where they lie among the columns that `windows` give it."""
    group = plan.groups[j]
    whole = slice(0, group.window_width)
    return [(whole, whole)] if plan.ring_channels is None else pieces(group.window_start, group.window_width, plan)


def reads_all(j: int, plan: Plan) -> bool:
    """Whether group j reads every column of the rows that `windows` give it.

    The first groups of a dense entry stage do not. Their gradients are cheaper as products over the columns read, gaps
    between the rows and all, than through oneDNN over the whole ring.
    """
    return plan.ring_channels in (None, plan.groups[j].window_width)


def store(gradient: Tensor, into: Tensor, j: int, plan: Plan) -> None:
    """The gradient of what `placed` gave, in the order of the weight."""
    for own, columns in over_columns(j, plan):
        into[:, own] = gradient[:, columns]


def store_product(grad: Tensor, window: Tensor, into: Tensor, j: int, plan: Plan, images: Images) -> None:
    """The 1×1 weight gradient [k, window] of group j: grad [P, k] transposed times window [P, columns]."""
    if reads_all(j, plan) and worth_onednn(grad) and window.is_contiguous():
        store(product_over_pixels(grad, window, images), into, j, plan)
        return
    for own, columns in over_columns(j, plan):
        torch.mm(grad.t(), window[:, columns], out=into[:, own])

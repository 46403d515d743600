"""Where the aten backend keeps activated channels, as rows [P, channels], while it walks the groups of a stage.

Two ways with one interface: `window(j)` is what group j reads, `slot(j)` where its own channels go, and `end()`, after
the last group, the channels that leave the buffer. `activated_input` is where the stage's input goes first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seqconv_triton.backend.aten_parts import window_rows
from seqconv_triton.backend.packing import group_masks, transform_weights

if TYPE_CHECKING:
    from torch import Tensor

    from seqconv_triton.backend import StageParameters
    from seqconv_triton.plan import Plan


class Ring:
    """The newest C channels, side by side: a group's output takes the place of the channels that nobody reads again.

    Buffer channel c lies in column c % C, so that a window is the whole ring, without a gap, and the weights over it
    are turned instead (`turned`). For plans that slide (`Plan.slides`).
    """

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self.plan = plan
        self.rows = like.new_empty(like.shape[0], plan.in_channels)
        self.first = plan.total_channels - plan.read_channels
        self.last = like.new_empty(like.shape[0], plan.read_channels)
        self.activated_input = self.rows

    def window(self, j: int) -> Tensor:
        if j == 0 and self.first < self.plan.in_channels:
            self.last[:, : self.plan.in_channels - self.first] = self.rows[:, self.first :]
        return self.rows

    def slot(self, j: int) -> Tensor:
        column = self.plan.slot(j) % self.plan.in_channels
        return self.rows[:, column : column + self.plan.group_width]

    def written(self, j: int) -> None:
        """Group j's slot has been filled."""
        place = self.plan.slot(j) - self.first
        if place >= 0:
            self.last[:, place : place + self.plan.group_width] = self.slot(j)

    def end(self) -> Tensor:
        return self.last


class Strips:
    """One strip a `Segment` of the plan, of about three windows; what the next one still needs is copied over."""

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self.plan, self.count = plan, like.shape[0]
        self.segments = iter(plan.segments)
        self.segment = next(self.segments)
        self.rows = self._allocate(like)
        self.activated_input = self.rows[:, : plan.in_channels]

    def _allocate(self, like: Tensor) -> Tensor:
        return like.new_empty(self.count, self.segment.stop - self.segment.start)

    def window(self, j: int) -> Tensor:
        if j == self.segment.last:
            previous, strip = self.segment, self.rows
            self.segment = next(self.segments)
            self.rows = self._allocate(strip)
            base = self.segment.start
            self.rows[:, : previous.stop - base] = strip[:, base - previous.start :]
        group = self.plan.groups[j]
        start = group.window_start - self.segment.start
        return self.rows[:, start : start + group.window_width]

    def slot(self, j: int) -> Tensor:
        column = self.plan.slot(j) - self.segment.start
        return self.rows[:, column : column + self.plan.group_width]

    def written(self, j: int) -> None:
        """Group j's slot has been filled."""

    def end(self) -> Tensor:
        return self.rows[:, -self.plan.read_channels :]


def windows(plan: Plan, like: Tensor) -> Ring | Strips:
    """Room for the activated channels of as many pixels as `like` [P, …] has."""
    return Ring(plan, like) if plan.slides else Strips(plan, like)


def turned(weights: tuple[Tensor, ...], plan: Plan) -> tuple[Tensor, ...]:
    """What goes with windows, channels in dimension 1 ([k, window, …], [N, window]), in the order of their columns."""
    if not (weights and plan.slides):  # basic layers have no 1×1 weights
        return weights
    groups = zip(weights, plan.groups, strict=True)
    return tuple(w.roll(group.window_start % plan.in_channels, 1) for w, group in groups)


def turned_weights(parameters: StageParameters, plan: Plan) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The 1×1 convs [k, window] and the 3×3 convs of all groups, those over windows as `turned`."""
    reduce = turned(window_rows(parameters.reduce_weight, plan), plan)
    transform = transform_weights(parameters.transform_weight, plan)
    return reduce, transform if plan.bottleneck else turned(transform, plan)


def turned_masks(mask: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """`group_masks`, in the order of the windows' columns; the tail's as it is."""
    masks, count = group_masks(mask, plan), len(plan.groups)
    return turned(masks[:count], plan) + masks[count:]


def store_turned(gradient: Tensor, into: Tensor, plan: Plan, j: int, *, over_window: bool) -> None:
    """The weight gradient of group j, over its window as its columns lie, in the order of the weight."""
    shift = plan.groups[j].window_start % plan.in_channels if over_window and plan.slides else 0
    channels = into.shape[1]
    into[:, : channels - shift] = gradient[:, shift:]
    into[:, channels - shift :] = gradient[:, :shift]

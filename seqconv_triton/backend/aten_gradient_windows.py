"""The windows of `aten_windows.py` walked backwards: activated channels, computed again, and their gradients.

`enter(j)` steps back to group j and gives the gradient [P, k] of its own channels in front of their ReLU. After it
`window(j)` is what the group read, and `add` and `add_product` add to the gradient of that. `input_rows()`, at last, is
the stage's input: activated, and the gradient of that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqconv_triton.backend.aten_parts import Images, add_product_
from seqconv_triton.plan import Plan, Segment

# Fills rows [P, stop - start] with the activated buffer channels [start, stop).
Activate = Callable[[int, int, Tensor], None]


class GradientRing:
    """The channels of one window, column c % C for buffer channel c (`Ring`)."""

    def __init__(self, plan: Plan, activate: Activate, like: Tensor, images: Images, d_end: Tensor | None) -> None:
        self.plan, self.activate, self.images, self.d_end = plan, activate, images, d_end
        self.first = plan.total_channels - plan.read_channels
        self.rows = like.new_empty(like.shape[0], plan.in_channels)
        self.gradient = torch.zeros_like(self.rows)
        for start in range(plan.total_channels - plan.in_channels, plan.total_channels, plan.group_width):
            self._take_in(start)

    def _columns(self, channel: int) -> slice:
        column = channel % self.plan.in_channels
        return slice(column, column + self.plan.group_width)

    def _take_in(self, start: int) -> None:
        """Channels [start, start + k) come in: activated, with the gradient that they have from outside."""
        own, k = self._columns(start), self.plan.group_width
        self.activate(start, start + k, self.rows[:, own])
        gradient = self.gradient[:, own].zero_()
        outside = max(start, self.first)  # the input's channels need not begin a group
        if self.d_end is not None and outside < start + k:
            gradient[:, outside - start :] = self.d_end[:, outside - self.first : start + k - self.first]

    def enter(self, j: int) -> Tensor:
        own = self._columns(self.plan.slot(j))
        gradient: Tensor = torch.ops.aten.threshold_backward(self.gradient[:, own], self.rows[:, own], 0)
        self._take_in(self.plan.groups[j].window_start)
        return gradient

    def window(self, j: int) -> Tensor:
        return self.rows

    def add(self, j: int, gradient: Tensor) -> None:
        self.gradient += gradient

    def add_product(self, j: int, dz: Tensor, weight: Tensor) -> None:
        """The gradient of the window grows by dz [P, k] times weight [k, window]."""
        add_product_(self.gradient, dz, weight, self.images)

    def input_rows(self) -> tuple[Tensor, Tensor]:
        return self.rows, self.gradient


class GradientStrips:
    """Strips of one `Segment` each (`Strips`)."""

    def __init__(self, plan: Plan, activate: Activate, like: Tensor, images: Images, d_end: Tensor | None) -> None:
        self.plan, self.activate = plan, activate
        self.segments = iter(reversed(plan.segments))
        self.segment = next(self.segments)
        self.rows, self.gradient = self._allocate(like, self.segment)
        if d_end is not None:
            self.gradient[:, -plan.read_channels :] = d_end

    def _allocate(self, like: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        rows = like.new_empty(like.shape[0], segment.stop - segment.start)
        self.activate(segment.start, segment.stop, rows)
        return rows, torch.zeros_like(rows)

    def enter(self, j: int) -> Tensor:
        if j < self.segment.first:
            later, gradient = self.segment, self.gradient
            self.segment = next(self.segments)
            self.rows, self.gradient = self._allocate(gradient, self.segment)
            self.gradient[:, later.start - self.segment.start :] = gradient[:, : self.segment.stop - later.start]
        start = self.plan.slot(j) - self.segment.start
        own = slice(start, start + self.plan.group_width)
        gradient_in_front: Tensor = torch.ops.aten.threshold_backward(self.gradient[:, own], self.rows[:, own], 0)
        return gradient_in_front

    def _view(self, j: int) -> slice:
        group = self.plan.groups[j]
        start = group.window_start - self.segment.start
        return slice(start, start + group.window_width)

    def window(self, j: int) -> Tensor:
        return self.rows[:, self._view(j)]

    def add(self, j: int, gradient: Tensor) -> None:
        self.gradient[:, self._view(j)] += gradient

    def add_product(self, j: int, dz: Tensor, weight: Tensor) -> None:
        """The gradient of the window grows by dz [P, k] times weight [k, window]."""
        self.gradient[:, self._view(j)].addmm_(dz, weight)

    def input_rows(self) -> tuple[Tensor, Tensor]:
        width = self.plan.in_channels
        return self.rows[:, :width], self.gradient[:, :width]


def gradient_windows(
    plan: Plan, activate: Activate, like: Tensor, images: Images, d_end: Tensor | None
) -> GradientRing | GradientStrips:
    """Windows for a backward pass over as many pixels as `like` [P, …] has; d_end [P, read] comes from outside."""
    return (GradientRing if plan.slides else GradientStrips)(plan, activate, like, images, d_end)

"""The windows of `windows.py` walked backwards: activated channels, computed again, and their gradients.

From the last group to the first, `enter(j)` steps back to group j and gives the gradient [P, k] of its own channels in
front of their ReLU; after it `window(j)` is what the group read, and `add` and `add_product` add to the gradient of
that. `newest(count)` are the last channels in front of the group; `begin` brings their gradient behind the last group,
and `add_newest` adds to it later. Last `input_gradient` is that of the stage's input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqconv_triton.backend.aten.parts import Images, add_product_, worth_onednn
from seqconv_triton.backend.aten.ring import column, over_columns, pieces, placed, reads_all
from seqconv_triton.plan import Plan, Segment

# Fills rows [P, …] with the activated buffer channels from the given one on.
Activate = Callable[[int, Tensor], None]
aten = torch.ops.aten


class GradientRing:
    """The newest channels in front of a group, in the columns of `ring.py`."""

    def __init__(self, plan: Plan, activate: Activate, like: Tensor, images: Images, ring: int) -> None:
        self.plan, self.activate, self.images, self.ring = plan, activate, images, ring
        self.rows = like.new_empty(like.shape[0], ring)
        for start in range(plan.total_channels - ring, plan.total_channels, plan.group_width):
            activate(start, self.rows[:, self._columns(start)])

    def _columns(self, channel: int) -> slice:
        start = column(channel, self.plan)
        return slice(start, start + self.plan.group_width)

    def newest(self, count: int) -> Tensor:
        """Where as many channels as fill the ring once, twice, … came behind them."""
        return self.rows[:, self.ring - count :]

    def begin(self, gradient: Tensor | None) -> None:
        """With the gradient of the newest channels, which it may keep."""
        whole = gradient is not None and gradient.shape[1] == self.ring
        self.gradient = gradient if whole and gradient is not None else torch.zeros_like(self.rows)
        if gradient is not None and not whole:
            self.gradient[:, self.ring - gradient.shape[1] :] = gradient

    def add_newest(self, gradient: Tensor) -> None:
        self.gradient[:, self.ring - gradient.shape[1] :] += gradient

    def enter(self, j: int) -> Tensor:
        slot = self.plan.slot(j)
        own = self._columns(slot)
        gradient: Tensor = aten.threshold_backward(self.gradient[:, own], self.rows[:, own], 0)
        if slot >= self.ring:
            own = self._columns(slot - self.ring)
            self.activate(slot - self.ring, self.rows[:, own])
            self.gradient[:, own].zero_()
        return gradient

    def window(self, j: int) -> Tensor:
        return self.rows

    def add(self, j: int, gradient: Tensor) -> None:
        self.gradient += gradient

    def add_product(self, j: int, dz: Tensor, weight: Tensor) -> None:
        """The gradient of the window grows by dz [P, k] times weight [k, window]."""
        if reads_all(j, self.plan) and worth_onednn(dz):
            add_product_(self.gradient, dz, placed(weight, j, self.plan), self.images)
            return
        for own, columns in over_columns(j, self.plan):
            self.gradient[:, columns].addmm_(dz, weight[:, own])

    def input_gradient(self, in_front_of_relu: bool) -> Tensor:
        parts = []
        for _, columns in pieces(0, self.plan.in_channels, self.plan):
            gradient = self.gradient[:, columns]
            parts.append(aten.threshold_backward(gradient, self.rows[:, columns], 0) if in_front_of_relu else gradient)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class GradientStrips:
    """Strips of one `Segment` each (`Strips`)."""

    def __init__(self, plan: Plan, activate: Activate, like: Tensor) -> None:
        self.plan, self.activate = plan, activate
        self.segments = iter(reversed(plan.segments))
        self.segment = next(self.segments)
        self.rows = self._activated(like, self.segment)

    def _activated(self, like: Tensor, segment: Segment) -> Tensor:
        rows = like.new_empty(like.shape[0], segment.stop - segment.start)
        self.activate(segment.start, rows)
        return rows

    def newest(self, count: int) -> Tensor:
        """In front of the last group has been entered."""
        return self.rows[:, self.rows.shape[1] - count :]

    def begin(self, gradient: Tensor | None) -> None:
        """With the gradient of the newest channels."""
        self.gradient = torch.zeros_like(self.rows)
        if gradient is not None:
            self.add_newest(gradient)

    def add_newest(self, gradient: Tensor) -> None:
        self.gradient[:, self.rows.shape[1] - gradient.shape[1] :] += gradient

    def enter(self, j: int) -> Tensor:
        if j < self.segment.first:
            later, gradient = self.segment, self.gradient
            self.segment = next(self.segments)
            self.rows = self._activated(gradient, self.segment)
            self.gradient = torch.zeros_like(self.rows)
            self.gradient[:, later.start - self.segment.start :] = gradient[:, : self.segment.stop - later.start]
        start = self.plan.slot(j) - self.segment.start
        own = slice(start, start + self.plan.group_width)
        gradient_in_front: Tensor = aten.threshold_backward(self.gradient[:, own], self.rows[:, own], 0)
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

    def input_gradient(self, in_front_of_relu: bool) -> Tensor:
        width = self.plan.in_channels
        gradient = self.gradient[:, :width]
        if not in_front_of_relu:
            return gradient
        through: Tensor = aten.threshold_backward(gradient, self.rows[:, :width], 0)
        return through


def gradient_windows(plan: Plan, activate: Activate, like: Tensor, images: Images) -> GradientRing | GradientStrips:
    """Windows for a backward pass over as many pixels as `like` [P, …] has."""
    ring = plan.ring_channels
    return GradientStrips(plan, activate, like) if ring is None else GradientRing(plan, activate, like, images, ring)

"""Where the aten backend keeps activated channels, as rows [P, channels], while it walks the groups of a stage.

Two ways with one interface: `input_pieces()` is where the stage's input goes first, `window(j)` what group j reads,
`slot(j)` where its own channels go, and `newest(count)` the last channels written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seqconv_triton.backend.aten.ring import column, pieces

if TYPE_CHECKING:
    from torch import Tensor

    from seqconv_triton.plan import Plan


class Ring:
    """The newest channels, in the columns of `ring.py`; for plans with `ring_channels`."""

    def __init__(self, plan: Plan, like: Tensor, ring: int) -> None:
        self.plan = plan
        self.rows = like.new_empty(like.shape[0], ring)
        self.clear()

    def clear(self) -> None:
        """A column that nobody has written yet meets weights of zero, and must not hold NaN."""
        if not self.plan.uniform:
            self.rows.zero_()

    def input_pieces(self) -> list[tuple[slice, Tensor]]:
        """Parts of the input's channels, and where each belongs."""
        return [(own, self.rows[:, columns]) for own, columns in pieces(0, self.plan.in_channels, self.plan)]

    def window(self, j: int) -> Tensor:
        return self.rows

    def slot(self, j: int) -> Tensor:
        start = column(self.plan.slot(j), self.plan)
        return self.rows[:, start : start + self.plan.group_width]

    def newest(self, count: int) -> Tensor:
        """Where as many channels as fill the ring once, twice, … are still to come."""
        return self.rows[:, self.rows.shape[1] - count :]


class Strips:
    """One strip a `Segment` of the plan, of about three windows; what the next one still needs is copied over."""

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self.plan, self.count = plan, like.shape[0]
        self.segments = iter(plan.segments)
        self.segment = next(self.segments)
        self.rows = self._allocate(like)

    def _allocate(self, like: Tensor) -> Tensor:
        return like.new_empty(self.count, self.segment.stop - self.segment.start)

    def input_pieces(self) -> list[tuple[slice, Tensor]]:
        """Parts of the input's channels, and where each belongs."""
        width = self.plan.in_channels
        return [(slice(0, width), self.rows[:, :width])]

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

    def newest(self, count: int) -> Tensor:
        """Behind the last group."""
        return self.rows[:, self.rows.shape[1] - count :]


def windows(plan: Plan, like: Tensor, before: Ring | Strips | None = None) -> Ring | Strips:
    """Room for the activated channels of as many pixels as `like` [P, …] has; that of `before`, where it fits.

    Fresh memory costs a page fault every 4 KiB.
    """
    if isinstance(before, Ring) and before.rows.shape[0] == like.shape[0]:
        before.clear()
        return before
    return Strips(plan, like) if plan.ring_channels is None else Ring(plan, like, plan.ring_channels)

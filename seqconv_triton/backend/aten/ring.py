"""Where the aten backend keeps activated channels while it walks the groups of a stage: a ring, as rows [P, channels].

A group's output takes the place of the oldest channels, which nobody reads again. Where windows fill a ring as wide as
the widest of them, or most of it, every group reads all of it, without gaps between its rows, as oneDNN wants it, but
turned: weights over the window are turned the same way, with zeros for the columns that the group does not read (so
that an infinite activation there makes the group's pixel NaN, where the reference may be finite; other images are
safe). Elsewhere the ring has room for four windows, so that most of them are a view of neighbouring columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from seqconv_triton.backend.packing import group_masks
from seqconv_triton.plan import Plan

# Part of some channels, and the columns in which it lies.
Piece = tuple[slice, slice]


class Ring:
    """The columns of a plan's buffer channels; `whole` says that every group reads all of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan, k = plan, plan.group_width
        windows = [group.window_width for group in plan.groups]
        widest, read, total = (-(-c // k) * k for c in (max(windows), plan.read_channels, plan.total_channels))
        # Columns outside a window cost a 1×1 conv little, a 3×3 conv nine times as much.
        filled = plan.uniform or (plan.bottleneck and 2 * sum(windows) >= widest * len(windows))
        self.whole = filled and plan.in_channels % k == 0 and output_parts(plan, widest) > 0
        self.channels = widest if self.whole else min(total, max(4 * widest, read))
        self.fits = tuple(window == self.channels for window in windows)
        # By group: where its window lies, where what it reads lies in what `gather` gives, where its own channels go.
        self.windows = tuple(self.pieces(group.window_start, group.window_width) for group in plan.groups)
        everything = tuple(slice(0, window) for window in windows)
        self.columns_read = self.windows if self.whole else tuple([(whole, whole)] for whole in everything)
        self.slots = tuple(self.column(slot) // k for slot in plan.slots)  # in widths of a group
        self.reads_unwritten = self.whole and not all(self.fits)

    def column(self, channel: int) -> int:
        """That of a buffer channel; the last ones, which leave the stage, stand in their own order."""
        return (channel - self.plan.total_channels) % self.channels

    def pieces(self, start: int, count: int) -> list[Piece]:
        """The buffer channels [start, start + count), one piece or, around the end of the ring, two."""
        first = self.column(start)
        before = min(count, self.channels - first)
        pieces = [(slice(0, before), slice(first, first + before))]
        if before < count:
            pieces.append((slice(before, count), slice(0, count - before)))
        return pieces

    def gather(self, rows: Tensor, j: int) -> Tensor:
        """What group j reads of rows [P, channels]: all columns, or its window."""
        if self.whole:
            return rows
        pieces = [rows[:, columns] for _, columns in self.windows[j]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def place(self, weight: Tensor, j: int, scale: Tensor | None = None) -> Tensor:
        """What goes with group j's window, channels in dimension 1, times `scale`, in the order of the columns read."""
        if not self.whole or (self.fits[j] and self.column(self.plan.groups[j].window_start) == 0):
            return weight if scale is None else weight * scale
        if scale is None and self.fits[j]:  # in two pieces, the later one first
            return torch.cat([weight[:, part] for part, _ in reversed(self.windows[j])], 1)
        new = weight.new_empty if self.fits[j] else weight.new_zeros
        out = new((weight.shape[0], self.channels, *weight.shape[2:]))
        for part, columns in self.windows[j]:
            if scale is None:
                out[:, columns] = weight[:, part]
            else:
                torch.mul(weight[:, part], scale, out=out[:, columns])
        return out

    def place_masks(self, mask: Tensor) -> tuple[Tensor, ...]:
        """`group_masks`, in the order of the columns read; the tail's as it is."""
        masks, count = group_masks(mask, self.plan), len(self.plan.groups)
        return tuple(self.place(m, j) for j, m in enumerate(masks[:count])) + masks[count:]


def output_parts(plan: Plan, channels: int) -> int:
    """In how many parts the output leaves a ring of so many channels; 0 where the tail's groups do not split so."""
    parts = -(-plan.read_channels // channels)
    tail = plan.tail
    if tail is None or parts == 1:
        return parts
    evenly = plan.read_channels % channels == 0 and tail.repeats == 1 and tail.groups % parts == 0
    return parts if evenly else 0


@lru_cache(maxsize=1024)
def ring_of(plan: Plan) -> Ring:
    return Ring(plan)


class Features:
    """Activated channels of as many pixels as `like` [P, …] has: the newest ones in the columns of a ring."""

    def __init__(self, ring: Ring, like: Tensor) -> None:
        self.ring = ring
        self.rows = like.new_empty(like.shape[0], ring.channels)
        self._slots = self.rows.split(ring.plan.group_width, 1)
        self.clear()

    def clear(self) -> None:
        """A column that nobody has written yet may meet weights of zero, and must not hold NaN then."""
        if self.ring.reads_unwritten:
            self.rows.zero_()

    def input_pieces(self) -> list[tuple[slice, Tensor]]:
        """Parts of the input's channels, and where each belongs."""
        pieces = self.ring.pieces(0, self.ring.plan.in_channels)
        return [(part, self.rows[:, columns]) for part, columns in pieces]

    def window(self, j: int) -> Tensor:
        """What group j reads."""
        return self.ring.gather(self.rows, j)

    def slot(self, j: int) -> Tensor:
        """Where group j's own channels go."""
        return self._slots[self.ring.slots[j]]

    def newest(self, count: int) -> Tensor:
        """The last channels written, where as many as fill the ring once, twice, … (or none) are still to come."""
        return self.rows[:, self.ring.channels - count :]

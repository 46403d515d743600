"""The ring of `ring.py` walked backwards: activated channels, computed again, and their gradients.

From the last group to the first, `enter(j)` steps back to group j and gives the gradient [P, k] of its output in front
of its ReLU; after it `window(j)` is what the group read, and `add` and `add_product` add to the gradient of that.
`newest(count)` are the last channels in front of the group; `begin` brings their gradient behind the last group, and
`add_newest` adds to it later. Last `input_gradient` is that of the stage's input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqconv_triton.backend.aten.parts import Groups, add_product_, pixels, product_over_pixels, worth_onednn

aten = torch.ops.aten


class RawFeatures:
    """The raw buffer in the backward pass, activated again a group at a time, which stays in the cache."""

    def __init__(self, buffer: Tensor, groups: Groups) -> None:
        self.rows, self.groups = pixels(buffer), groups
        # Raw channels without gaps between rows, from their activation to BN's backward, which is slow on others.
        self.contiguous: dict[int, Tensor] = {}

    def images(self, start: int, stop: int) -> Tensor:
        return self.groups.images(self.rows[:, start:stop].contiguous())

    def group(self, j: int) -> Tensor:
        """Group j's raw output."""
        c = self.groups.plan.slot(j)
        return self.contiguous.pop(c) if c in self.contiguous else self.images(c, c + self.groups.plan.group_width)

    def activate(self, start: int, into: Tensor) -> None:
        """Fill rows [P, …] with the activated buffer channels from `start` on."""
        plan, count = self.groups.plan, into.shape[1]
        done = 0 if plan.raw_input else min(count, max(0, plan.in_channels - start))
        into[:, :done] = self.rows[:, start : start + done]
        for first in range(done, count, plan.group_width):
            last = min(first + plan.group_width, count)
            raw = self.images(start + first, start + last)
            torch.clamp_min(pixels(self.groups.norm.apply(raw, start + first)), 0, out=into[:, first:last])
            if count == plan.group_width and start >= plan.in_channels:
                self.contiguous[start] = raw


class FeatureGradients:
    """The newest channels in front of a group and their gradients, in the columns of the ring."""

    def __init__(self, groups: Groups, raw: RawFeatures) -> None:
        self.groups, self.raw, self.ring, self.plan = groups, raw, groups.ring, groups.plan
        self.rows = raw.rows.new_empty(raw.rows.shape[0], self.ring.channels)
        total = self.plan.total_channels
        for start in range(total - self.ring.channels, total, self.plan.group_width):
            self._activate(start)

    def _columns(self, start: int) -> tuple[int, slice]:
        """The first of the channels [start, start + k) that lies in the buffer, and the columns from it on."""
        first = max(0, start)
        column = self.ring.column(first)
        return first, slice(column, column + max(0, start + self.plan.group_width - first))

    def _activate(self, start: int) -> slice:
        first, columns = self._columns(start)
        self.raw.activate(first, self.rows[:, columns])
        return columns

    def newest(self, count: int) -> Tensor:
        """Where as many channels as fill the ring once, twice, … (or none) came behind them."""
        return self.rows[:, self.ring.channels - count :]

    def begin(self, gradient: Tensor | None) -> None:
        """With the gradient of the newest channels, which it may keep."""
        whole = gradient is not None and gradient.shape[1] == self.ring.channels
        self.gradient = gradient if whole and gradient is not None else torch.zeros_like(self.rows)
        if gradient is not None and not whole:
            self.gradient[:, self.ring.channels - gradient.shape[1] :] = gradient

    def add_newest(self, gradient: Tensor) -> None:
        self.gradient[:, self.ring.channels - gradient.shape[1] :] += gradient

    def enter(self, j: int) -> Tensor:
        slot = self.plan.slot(j)
        _, columns = self._columns(slot)
        gradient: Tensor = aten.threshold_backward(self.gradient[:, columns], self.rows[:, columns], 0)
        columns = self._activate(slot - self.ring.channels)  # whose place the group's had taken
        self.gradient[:, columns].zero_()
        return gradient

    def window(self, j: int) -> Tensor:
        return self.ring.gather(self.rows, j)

    def add(self, j: int, gradient: Tensor) -> None:
        """The gradient of what `window` gave."""
        if self.ring.whole:
            self.gradient += gradient
            return
        for part, columns in self.ring.windows[j]:
            self.gradient[:, columns] += gradient[:, part]

    def add_product(self, j: int, dz: Tensor, weight: Tensor) -> None:
        """The gradient of the window grows by dz [P, k] times weight [k, window].

        Narrow windows: cheaper as products over their columns, gaps between the rows and all, than through oneDNN over
        the whole ring.
        """
        if self.ring.fits[j] and worth_onednn(dz):
            add_product_(self.gradient, dz, self.ring.place(weight, j), self.groups.images)
            return
        for part, columns in self.ring.windows[j]:
            self.gradient[:, columns].addmm_(dz, weight[:, part])

    def store(self, gradient: Tensor, into: Tensor, j: int) -> None:
        """The gradient of what `Ring.place` gave, in the order of the weight."""
        for part, columns in self.ring.columns_read[j]:
            into[:, part] = gradient[:, columns]

    def store_product(self, grad: Tensor, window: Tensor, into: Tensor, j: int) -> None:
        """The 1×1 weight gradient [k, window] of group j: grad [P, k] transposed times `window` [P, columns]."""
        if window.shape[1] == into.shape[1] and worth_onednn(grad) and window.is_contiguous():
            self.store(product_over_pixels(grad, window, self.groups.images), into, j)
            return
        for part, columns in self.ring.columns_read[j]:
            torch.mm(grad.t(), window[:, columns], out=into[:, part])

    def input_gradient(self, in_front_of_relu: bool) -> Tensor:
        parts = []
        for _, columns in self.ring.pieces(0, self.plan.in_channels):
            gradient = self.gradient[:, columns]
            parts.append(aten.threshold_backward(gradient, self.rows[:, columns], 0) if in_front_of_relu else gradient)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

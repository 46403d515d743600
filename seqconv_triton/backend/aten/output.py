"""What leaves a stage in the aten backend: its last channels, as they are or through the tail.

A ring may hold fewer channels than leave: they leave in parts, each in front of the group that begins to overwrite it,
as soon as so and so many channels are `written`. Backward their gradients come in the same way, the last part first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqconv_triton.backend.aten.gradients import FeatureGradients
from seqconv_triton.backend.aten.parts import Images, convolution, pixels
from seqconv_triton.backend.aten.ring import Features, Ring, output_parts

aten = torch.ops.aten


class Part(NamedTuple):
    """Some of the channels that leave, and their share of the tail."""

    channels: slice  # among those that leave
    outputs: slice  # among the tail's output channels
    groups: int  # of the tail

    @property
    def size(self) -> int:
        return int(self.channels.stop - self.channels.start)


class Output:
    """A stage's output; of its dropout masks the last, [N, read_channels], is the tail's."""

    def __init__(
        self, ring: Ring, images: Images, tail_weight: Tensor | None, masks: tuple[Tensor, ...] | None
    ) -> None:
        plan = ring.plan
        self.images, self.weight, self.tail = images, tail_weight, plan.tail
        self.mask = None if masks is None else masks[-1]
        count, size = output_parts(plan, ring.channels), min(plan.read_channels, ring.channels)
        self.parts: dict[int, Part] = {}  # by the number of channels written when it leaves
        for i in range(count):
            stop = plan.read_channels - (count - 1 - i) * size
            channels = slice(max(0, stop - size), stop)
            part = Part(channels, channels, 1)
            if plan.tail is not None:
                share = plan.out_channels // count
                part = Part(channels, slice(i * share, (i + 1) * share), plan.tail.groups // count)
            self.parts[max(plan.in_channels, plan.total_channels - plan.read_channels + stop)] = part

    def write(self, written: int, features: Features, out: Tensor) -> None:
        """Write into `out` what leaves now, if anything does."""
        if written not in self.parts:
            return
        part = self.parts[written]
        rows = features.newest(part.size)
        if self.tail is None:
            out[:, part.channels] = self.images(rows)
            return
        assert self.weight is not None
        x, weight = self._seen_by_tail(part, rows), self.weight[part.outputs]
        out[:, part.outputs] = convolution(x, weight, None, self.tail.stride, part.groups)

    def _seen_by_tail(self, part: Part, rows: Tensor) -> Tensor:
        x = self.images(rows)
        if self.mask is not None:
            x = x * self.mask[:, part.channels, None, None]
        return x if self.tail is None or self.tail.repeats == 1 else torch.cat([x] * self.tail.repeats, 1)

    def gradient(
        self, written: int, features: FeatureGradients, d_out: Tensor | None, d_weight: Tensor | None
    ) -> Tensor | None:
        """The gradient [P, channels] of what leaves now, no one else's; writes its share of the tail weight's."""
        if d_out is None or written not in self.parts:
            return None
        part = self.parts[written]
        if self.tail is None:
            return pixels(d_out)[:, part.channels].clone(memory_format=torch.contiguous_format)
        return self._tail_gradient(part, features.newest(part.size), d_out, d_weight)

    def _tail_gradient(self, part: Part, rows: Tensor, d_out: Tensor, d_weight: Tensor | None) -> Tensor:
        assert self.weight is not None and self.tail is not None
        x, tail, padding = self._seen_by_tail(part, rows), self.tail, self.tail.kernel_size // 2
        d_x, dw, _ = aten.convolution_backward(
            d_out[:, part.outputs], x, self.weight[part.outputs], None, [tail.stride] * 2, [padding] * 2, [1, 1],
            False, [0, 0], part.groups, [True, d_weight is not None, False],
        )  # fmt: skip
        if d_weight is not None:
            d_weight[part.outputs] = dw
        if tail.repeats > 1:
            d_x = torch.stack(d_x.chunk(tail.repeats, 1)).sum(0)
        if self.mask is not None:
            d_x = d_x * self.mask[:, part.channels, None, None]
        return pixels(d_x).contiguous()

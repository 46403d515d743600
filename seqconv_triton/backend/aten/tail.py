"""What leaves a stage in the aten backend: its last channels, as they are or through the tail.

A ring holds fewer channels than may leave: they leave in parts, each in front of the group that begins to overwrite it.
Backward their gradients come in the same way, the last part first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqconv_triton.backend.aten.parts import Images, pixels, tail_convolution
from seqconv_triton.plan import Plan

aten = torch.ops.aten


class Part(NamedTuple):
    """Some of the channels that leave, and their share of the tail."""

    channels: slice  # among those that leave
    outputs: slice  # among the tail's output channels
    groups: int  # of the tail


def parts(plan: Plan) -> dict[int, Part]:
    """By the first buffer channel that is not written yet when the part leaves; the last leaves behind all groups."""
    read, tail = plan.read_channels, plan.tail
    size = min(read, plan.ring_channels or read)
    count = -(-read // size)
    found = {}
    for i in range(count):
        stop = read - (count - 1 - i) * size
        channels = slice(max(0, stop - size), stop)
        moment = max(plan.in_channels, plan.total_channels - read + stop)
        if tail is None:
            found[moment] = Part(channels, channels, 1)
        else:
            share = tail.out_channels // count
            found[moment] = Part(channels, slice(i * share, (i + 1) * share), tail.groups // count)
    return found


class End:
    """The parts of a stage's end, with the tail's weight and its dropout mask [N, read_channels]."""

    def __init__(self, plan: Plan, images: Images, tail_weight: Tensor | None, mask: Tensor | None) -> None:
        self.plan, self.images, self.tail_weight, self.mask = plan, images, tail_weight, mask
        self.parts = parts(plan)

    def width(self, moment: int) -> int:
        """How many channels leave then."""
        channels = self.parts[moment].channels
        return channels.stop - channels.start

    def _seen_by_tail(self, part: Part, rows: Tensor) -> Tensor:
        x = self.images(rows)
        return x if self.mask is None else x * self.mask[:, part.channels, None, None]

    def leave(self, moment: int, rows: Tensor, out: Tensor) -> None:
        """Write the share of `out` that the part's activated channels, rows [P, channels], give."""
        part, tail = self.parts[moment], self.plan.tail
        if tail is None:
            out[:, part.channels] = self.images(rows)
            return
        assert self.tail_weight is not None
        x, weight = self._seen_by_tail(part, rows), self.tail_weight[part.outputs]
        out[:, part.outputs] = tail_convolution(x, weight, tail, part.groups)

    def gradient(self, moment: int, rows: Tensor, d_out: Tensor, d_tail_weight: Tensor | None) -> Tensor:
        """That of `rows` [P, channels], no one else's; writes the share of the tail weight's."""
        part, tail = self.parts[moment], self.plan.tail
        if tail is None:
            return pixels(d_out)[:, part.channels].clone(memory_format=torch.contiguous_format)
        assert self.tail_weight is not None
        x, padding = self._seen_by_tail(part, rows), tail.kernel_size // 2
        x = torch.cat([x] * tail.repeats, 1) if tail.repeats > 1 else x
        d_x, dw, _ = aten.convolution_backward(
            d_out[:, part.outputs], x, self.tail_weight[part.outputs], None, [tail.stride] * 2, [padding] * 2, [1, 1],
            False, [0, 0], part.groups, [True, d_tail_weight is not None, False],
        )  # fmt: skip
        if d_tail_weight is not None:
            d_tail_weight[part.outputs] = dw
        if tail.repeats > 1:
            d_x = torch.stack(d_x.chunk(tail.repeats, 1)).sum(0)
        if self.mask is not None:
            d_x = d_x * self.mask[:, part.channels, None, None]
        return pixels(d_x).contiguous()

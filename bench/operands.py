"""Random operands of a model's stage, as the Triton kernels take them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from seqconv_triton.backend.triton.parts import Geometry, packed
from seqconv_triton.kernels.launch import BatchNorm, ConvShape, Scratch
from seqconv_triton.plan import Plan


class Operands:
    """Features, weights and gradients of a stage, each made when it is first asked for; `j` is its middle group."""

    def __init__(self, plan: Plan, batch: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.plan, self.dtype, self.device, self.batch, self.size = plan, dtype, device, batch, size
        self.k, self.count, self.pixels = plan.group_width, len(plan.groups), batch * size * size
        self.j = self.count // 2
        self.geometry = Geometry(plan, torch.empty(batch, 1, size, size, device=device))
        self.inside = packed(self.geometry.inside)
        self.identity = plan.total_channels - plan.normalized_channels  # channels that are activated already

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def vector(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device)

    def norm(self, channels: int) -> BatchNorm:
        weight, bias, mean, var = torch.randn(4, channels, device=self.device)
        return BatchNorm(1 + 0.1 * weight, 0.1 * bias, 0.1 * mean, 1 + 0.1 * var.abs())

    def scratch(self) -> Scratch:
        return Scratch.allocate(self.raw, self.pixels, max(self.k, self.plan.in_channels))

    @cached_property
    def raw(self) -> Tensor:
        """The stage's buffer, [P, B]."""
        return self.normal(self.pixels, self.plan.total_channels)

    @cached_property
    def activated(self) -> Tensor:
        return self.raw.relu()

    @cached_property
    def z(self) -> Tensor:
        return self.normal(self.count, self.pixels, self.k)

    @cached_property
    def dz(self) -> Tensor:
        return self.normal(self.count, self.pixels, self.k)

    @cached_property
    def dy(self) -> Tensor:
        return self.normal(self.count, self.pixels, self.k)

    @cached_property
    def main(self) -> BatchNorm:
        return self.norm(self.plan.normalized_channels)

    @cached_property
    def inner(self) -> BatchNorm:
        return self.norm(self.count * self.k)

    @cached_property
    def reduce(self) -> Tensor:
        """Weights of the 1×1 convs, [J·k, C]."""
        return self.normal(self.count * self.k, self.plan.in_channels) / self.plan.in_channels**0.5

    @cached_property
    def transform(self) -> Tensor:
        inside = self.k // self.plan.subgroups
        return self.normal(self.count * self.k, inside, 3, 3) / (9 * inside) ** 0.5

    @cached_property
    def tail(self) -> tuple[Tensor, ConvShape]:
        shape, tail = self.plan.tail_weight_shape, self.geometry.tail
        assert shape is not None and tail is not None
        return self.normal(*shape) / (shape[1] * shape[2] ** 2) ** 0.5, tail

    def own(self, j: int) -> slice:
        """A group's rows of a weight, or its entries of the inner BNs."""
        return slice(j * self.k, (j + 1) * self.k)

    def slot(self, j: int, offset: int = 0) -> slice:
        """A group's channels in the buffer, less `offset`."""
        start = self.plan.slot(j) - offset
        return slice(start, start + self.k)

    def window(self, j: int) -> slice:
        start = self.plan.groups[j].window_start
        return slice(start, start + self.plan.in_channels)

    def images(self, rows: Tensor) -> Tensor:
        """[P, C] as [N, C, H, W], channels-last."""
        return rows.view(self.batch, self.size, self.size, -1).permute(0, 3, 1, 2)


def rows(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def part(norm: BatchNorm, entries: slice) -> BatchNorm:
    return BatchNorm(*(None if vector is None else vector[entries] for vector in norm))

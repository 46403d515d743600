"""Each Triton kernel alone, at the shapes of a model's stage, beside the same operation in PyTorch's own ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from seqconv_triton.kernels.data_gradient import data_gradient
from torch import Tensor
from torch.nn.grad import conv2d_weight

from bench.subjects import stage_of
from seqconv_triton.backend.triton.parts import Geometry
from seqconv_triton.kernels.convolution import convolution
from seqconv_triton.kernels.launch import FORWARD_ROWS, MEAN, VAR, Features, Scratch
from seqconv_triton.kernels.statistics import input_statistics
from seqconv_triton.kernels.weight_gradient import weight_gradient
from seqconv_triton.plan import Plan

EPS = 1e-5


@dataclass
class Kernel:
    """`ours` launches the kernel, `torch` computes the same from the same operands; both return the result."""

    ours: Callable[[], Tensor]
    torch: Callable[[torch.dtype], Tensor]


class Operands:
    """Random features, weights and gradients of a stage, and its group in the middle."""

    def __init__(self, plan: Plan, batch: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        self.plan, self.dtype, self.batch, self.size = plan, dtype, batch, size
        k, count, pixels = plan.group_width, len(plan.groups), batch * size * size
        self.j = count // 2
        self.group = plan.groups[self.j]
        self.width = plan.in_channels
        self.raw = normal(pixels, plan.total_channels).to(dtype)
        self.scale, self.shift = 1 + 0.1 * normal(plan.total_channels), 0.1 * normal(plan.total_channels)
        self.z = normal(count, pixels, k).to(dtype)
        self.inner_scale, self.inner_shift = 1 + 0.1 * normal(count * k), 0.1 * normal(count * k)
        self.dz, self.dy = normal(count, pixels, k).to(dtype), normal(count, pixels, k).to(dtype)
        self.reduce = (normal(count * k, self.width) / self.width**0.5).to(dtype)
        inside = k // plan.subgroups
        self.transform = (normal(count * k, inside, 3, 3) / (9 * inside) ** 0.5).to(dtype)
        shape = plan.tail_weight_shape
        self.tail = None if shape is None else (normal(*shape) / (shape[1] * shape[2] ** 2) ** 0.5).to(dtype)
        self.geometry = Geometry(plan, torch.empty(batch, 1, size, size, device=device))
        self.tables = self.geometry.tables
        self.taps_first = self.transform.permute(0, 2, 3, 1).contiguous()

    def window(self, j: int, dtype: torch.dtype) -> Tensor:
        """The activated window [P, C] of a group."""
        columns = slice(self.plan.groups[j].window_start, self.plan.groups[j].window_start + self.width)
        value = self.raw[:, columns].to(dtype) * self.scale[columns].to(dtype) + self.shift[columns].to(dtype)
        return value.relu()

    def inner(self, j: int, dtype: torch.dtype) -> Tensor:
        """The activated z [P, k] of a group."""
        own = self.own(j)
        return (self.z[j].to(dtype) * self.inner_scale[own].to(dtype) + self.inner_shift[own].to(dtype)).relu()

    def own(self, j: int) -> slice:
        return slice(j * self.plan.group_width, (j + 1) * self.plan.group_width)

    def images(self, rows: Tensor) -> Tensor:
        """[P, C] as [N, C, H, W], channels-last."""
        return rows.view(self.batch, self.size, self.size, -1).permute(0, 3, 1, 2)

    def source(self) -> Features:
        return Features(self.raw, self.scale, self.shift)


def rows(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def reduce_forward(o: Operands) -> Kernel:
    out = o.raw.new_empty((len(o.raw), o.plan.group_width))
    weight = o.reduce[o.own(o.j)]

    def ours() -> Tensor:
        convolution(o.source(), o.group.window_start, weight, o.geometry.windows[o.j], out)
        return out

    return Kernel(ours, lambda dtype: o.window(o.j, dtype) @ weight.to(dtype).t())


def transform_forward(o: Operands) -> Kernel:
    own = o.own(o.j)
    source = Features(o.z[o.j], o.inner_scale[own], o.inner_shift[own])
    out = torch.empty_like(o.raw)[:, : o.plan.group_width]  # a slot of the buffer: rows as far apart as there

    def ours() -> Tensor:
        convolution(source, 0, o.taps_first[own], o.geometry.inside, out)
        return out

    def plain(dtype: torch.dtype) -> Tensor:
        images = o.images(o.inner(o.j, dtype))
        return rows(F.conv2d(images, o.transform[own].to(dtype), padding=1, groups=o.plan.subgroups))

    return Kernel(ours, plain)


def tail_forward(o: Operands) -> Kernel:
    tail, shape = o.plan.tail, o.geometry.tail
    assert tail is not None and shape is not None and o.tail is not None and tail.repeats == 1
    weight, first = o.tail, o.plan.total_channels - o.plan.read_channels
    taps_first = weight.permute(0, 2, 3, 1).contiguous()
    out = o.raw.new_empty((shape.out_pixels, shape.c_out))

    def ours() -> Tensor:
        convolution(o.source(), first, taps_first, shape, out)
        return out

    def plain(dtype: torch.dtype) -> Tensor:
        read = (o.raw[:, first:].to(dtype) * o.scale[first:].to(dtype) + o.shift[first:].to(dtype)).relu()
        images, padding = o.images(read), tail.kernel_size // 2
        return rows(F.conv2d(images, weight.to(dtype), stride=tail.stride, padding=padding, groups=tail.groups))

    return Kernel(ours, plain)


def reduce_backward(o: Operands) -> Kernel:
    """The gradient of one group's output, pulled from all groups that read it."""
    k, c = o.plan.group_width, o.plan.slot(o.j)
    span = o.plan.readers[o.j + 1]
    out = o.raw.new_empty((len(o.raw), k))

    def ours() -> Tensor:
        data_gradient(o.dz, o.reduce, o.geometry.windows[0], o.tables[0], span, c, k, out, EPS, windows=True)
        return out

    def plain(dtype: torch.dtype) -> Tensor:
        total = torch.zeros_like(out, dtype=dtype)
        for i in range(*span):
            column = c - o.plan.groups[i].window_start
            total += o.dz[i].to(dtype) @ o.reduce[o.own(i), column : column + k].to(dtype)
        return total

    return Kernel(ours, plain)


def transform_backward(o: Operands) -> Kernel:
    k = o.plan.group_width
    out = o.raw.new_empty((len(o.raw), k))

    def ours() -> Tensor:
        data_gradient(
            o.dy, o.taps_first, o.geometry.inside, o.tables[1], (o.j, o.j + 1), 0, k, out, EPS, windows=False
        )  # fmt: skip
        return out

    def plain(dtype: torch.dtype) -> Tensor:
        images, weight = o.images(o.dy[o.j].to(dtype)), o.transform[o.own(o.j)].to(dtype)
        return rows(F.conv_transpose2d(images, weight, padding=1, groups=o.plan.subgroups))

    return Kernel(ours, plain)


def reduce_weights(o: Operands) -> Kernel:
    def ours() -> Tensor:
        shape = o.geometry.windows[0]
        return weight_gradient(o.dz, o.source(), shape, o.tables[0], o.width, True, o.reduce.numel()).view_as(o.reduce)

    def plain(dtype: torch.dtype) -> Tensor:
        return torch.cat([o.dz[j].to(dtype).t() @ o.window(j, dtype) for j in range(len(o.plan.groups))])

    return Kernel(ours, plain)


def transform_weights(o: Operands) -> Kernel:
    source = Features(o.z, o.inner_scale, o.inner_shift)

    def ours() -> Tensor:
        flat = weight_gradient(
            o.dy, source, o.geometry.inside, o.tables[1], o.plan.group_width, False, o.transform.numel(),
            own_source=True,
        )  # fmt: skip
        return flat.view(o.taps_first.shape).permute(0, 3, 1, 2)

    def plain(dtype: torch.dtype) -> Tensor:
        found = []
        for j in range(len(o.plan.groups)):
            images, above = o.images(o.inner(j, dtype)), o.images(o.dy[j].to(dtype))
            shape = (o.plan.group_width, *o.transform.shape[1:])
            found.append(conv2d_weight(images, shape, above, padding=1, groups=o.plan.subgroups))
        return torch.cat(found)

    return Kernel(ours, plain)


def statistics(o: Operands) -> Kernel:
    norm = torch.zeros((FORWARD_ROWS, o.plan.total_channels), device=o.raw.device)
    scratch = Scratch.allocate(o.raw, len(o.raw), o.width)

    def ours() -> Tensor:
        input_statistics(o.raw[:, : o.width], norm[:, : o.width], scratch, EPS)
        return norm[MEAN : VAR + 1, : o.width]

    def plain(dtype: torch.dtype) -> Tensor:
        var, mean = torch.var_mean(o.raw[:, : o.width].to(dtype), 0, correction=0)
        return torch.stack([mean, var])

    return Kernel(ours, plain)


FAMILIES: dict[str, Callable[[Operands], Kernel]] = {
    "convolution 1×1": reduce_forward,
    "convolution 3×3": transform_forward,
    "convolution tail": tail_forward,
    "data gradient 1×1": reduce_backward,
    "data gradient 3×3": transform_backward,
    "weight gradient 1×1": reduce_weights,
    "weight gradient 3×3": transform_weights,
    "statistics": statistics,
}


def make(subject: str, batch: int, image: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel of "kernel FAMILY, MODEL stage NUMBER"."""
    family, stage = subject.removeprefix("kernel ").split(", ")
    plan, shape = stage_of(stage, image)
    return FAMILIES[family](Operands(plan, batch, shape.size, dtype, device))

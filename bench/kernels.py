"""Each Triton kernel alone, at the shapes of a model's stage, beside the same operation in PyTorch's own ops.

Forward kernels run as an evaluation launches them, with the BN behind in their epilogue, backward ones as a training
step does, with the sums of the BN in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from bench.operands import Operands, part, rows
from bench.subjects import stage_of
from seqconv_triton.backend.triton.parts import in_blocks, mirrored, packed, taps_first
from seqconv_triton.kernels.convolution import convolution
from seqconv_triton.kernels.elementwise import activate
from seqconv_triton.kernels.launch import BatchNorm, NormGradient
from seqconv_triton.kernels.pixels import pixel_table
from seqconv_triton.kernels.pull import NewestGradient, pull
from seqconv_triton.kernels.statistics import input_statistics
from seqconv_triton.kernels.transposed import transposed
from seqconv_triton.kernels.weight_gradient import conv_gradient, window_gradient

EPS = 1e-5
Results = dict[str, Tensor]


@dataclass
class Kernel:
    """`ours` launches the kernel, `torch` computes the same from the same operands in a precision."""

    ours: Callable[[], Results]
    torch: Callable[[torch.dtype], Results]


def vectors(norm: BatchNorm, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Weight, bias, mean and variance, in no less than float32, as in PyTorch's BNs."""
    return tuple(vector.to(torch.promote_types(dtype, torch.float32)) for vector in norm if vector is not None)


def relu_of(x: Tensor, norm: BatchNorm) -> Tensor:
    """relu(BN(x)) of [P, C] or of images."""
    weight, bias, mean, var = vectors(norm, x.dtype)
    return F.batch_norm(x, mean, var, weight, bias, eps=EPS).relu_()


def behind_relu(g: Tensor, raw: Tensor, norm: BatchNorm) -> Results:
    """g [P, C] through the ReLU of a BN, and that BN's gradients."""
    weight, bias, mean, var = vectors(norm, g.dtype)
    scale = weight * (var + EPS).rsqrt()
    g = torch.where(raw * scale.to(g.dtype) > (scale * mean - bias).to(g.dtype), g, 0)
    x = (raw - mean.to(g.dtype)) * (var + EPS).rsqrt().to(g.dtype)
    return {"g": g, "weight": (g * x).sum(0, dtype=weight.dtype), "bias": g.sum(0, dtype=weight.dtype)}


def reduce_forward(o: Operands) -> Kernel:
    z, weight, norm = o.normal(o.pixels, o.k), o.reduce[o.own(o.j)], part(o.inner, o.own(o.j))
    x, start, shape = o.activated, o.plan.groups[o.j].window_start, o.geometry.windows[o.j]

    def ours() -> Results:
        convolution(x, start, weight, shape, activated=z, norm=norm, eps=EPS)
        return {"z": z}

    return Kernel(ours, lambda dtype: {"z": relu_of(x[:, o.window(o.j)].to(dtype) @ weight.to(dtype).t(), norm)})


def transform_forward(o: Operands) -> Kernel:
    z, weight, norm = o.normal(o.pixels, o.k).relu_(), o.transform[o.own(o.j)], part(o.main, o.slot(o.j, o.identity))
    ready, y = taps_first(in_blocks(weight, o.geometry.inside)), o.raw[:, o.slot(o.j)]

    def ours() -> Results:
        convolution(z, 0, ready, o.inside, activated=y, norm=norm, eps=EPS)
        return {"y": y}

    def plain(dtype: torch.dtype) -> Results:
        y = F.conv2d(o.images(z.to(dtype)), weight.to(dtype), padding=1, groups=o.plan.subgroups)
        return {"y": rows(relu_of(y, norm))}

    return Kernel(ours, plain)


def tail_forward(o: Operands) -> Kernel:
    (weight, shape), tail, first = o.tail, o.plan.tail, o.plan.total_channels - o.plan.read_channels
    assert tail is not None and tail.repeats == 1
    ready, x, out = taps_first(in_blocks(weight, shape)), o.activated, o.normal(shape.out_pixels, shape.c_out)

    def ours() -> Results:
        convolution(x[:, first:], 0, ready, packed(shape), raw=out)
        return {"out": out}

    def plain(dtype: torch.dtype) -> Results:
        images, padding = o.images(x[:, first:].to(dtype)), tail.kernel_size // 2
        return {"out": rows(F.conv2d(images, weight.to(dtype), None, tail.stride, padding, 1, tail.groups))}

    return Kernel(ours, plain)


def pull_backward(o: Operands) -> Kernel:
    (first, last), windows, start = o.plan.readers[o.j + 1], o.geometry.readers(), o.plan.slot(o.j)
    raw, norm, upstream = o.raw[:, o.slot(o.j)], part(o.main, o.slot(o.j, o.identity)), o.normal(o.pixels, o.k)
    coefficients = 1 + 0.1 * torch.randn(3, o.k, device=o.device)
    newest = NewestGradient(upstream, o.z[first], coefficients)
    g, into, scratch = o.normal(o.pixels, o.k), gradient(o), o.scratch()

    def ours() -> Results:
        pull(
            o.dz, o.reduce, windows, (first, last), start, g, newest=newest, raw=raw, norm=norm, into=into,
            scratch=scratch, eps=EPS,
        )  # fmt: skip
        return results(g, into)

    def plain(dtype: torch.dtype) -> Results:
        a, b, c = coefficients.to(dtype)
        dz = [a * upstream.to(dtype) + b * o.z[first].to(dtype) + c, *o.dz[first + 1 : last].to(dtype)]
        places = [start - group.window_start for group in o.plan.groups[first:last]]
        weights = [o.reduce[o.own(i), at : at + o.k] for i, at in zip(range(first, last), places, strict=True)]
        return behind_relu(torch.cat(dz, 1) @ torch.cat(weights).to(dtype), raw.to(dtype), norm)

    return Kernel(ours, plain)


def gradient(o: Operands) -> NormGradient:
    """Where a group's BN leaves its gradients."""
    return NormGradient(o.vector(o.k), o.vector(o.k), o.vector(3, o.k))


def results(g: Tensor, into: NormGradient) -> Results:
    assert into.weight is not None and into.bias is not None
    return {"g": g, "weight": into.weight, "bias": into.bias}


def transform_backward(o: Operands) -> Kernel:
    weight, raw, norm = o.transform[o.own(o.j)], o.z[o.j], part(o.inner, o.own(o.j))
    ready = mirrored(in_blocks(weight, o.geometry.inside), o.inside.group_out)
    g, into, scratch = o.normal(o.pixels, o.k), gradient(o), o.scratch()

    def ours() -> Results:
        transposed(o.dy[o.j], ready, o.inside, g, raw=raw, norm=norm, into=into, scratch=scratch, eps=EPS)
        return results(g, into)

    def plain(dtype: torch.dtype) -> Results:
        images = o.images(o.dy[o.j].to(dtype))
        g = F.conv_transpose2d(images, weight.to(dtype), padding=1, groups=o.plan.subgroups)
        return behind_relu(rows(g), raw.to(dtype), norm)

    return Kernel(ours, plain)


def tail_backward(o: Operands) -> Kernel:
    (weight, shape), tail, channels = o.tail, o.plan.tail, o.plan.read_channels
    assert tail is not None and tail.repeats == 1
    ready = mirrored(in_blocks(weight, shape), packed(shape).group_out)
    d_out, d_in = o.normal(shape.out_pixels, shape.c_out), o.normal(o.pixels, channels)

    def ours() -> Results:
        transposed(d_out, ready, packed(shape), d_in)
        return {"d_in": d_in}

    def plain(dtype: torch.dtype) -> Results:
        size, padding = (o.batch, channels, o.size, o.size), tail.kernel_size // 2
        images = leaving(o, d_out.to(dtype))
        d_in = conv2d_input(size, weight.to(dtype), images, tail.stride, padding, groups=tail.groups)
        return {"d_in": rows(d_in)}

    return Kernel(ours, plain)


def leaving(o: Operands, out: Tensor) -> Tensor:
    """[P_out, C] behind the tail as images."""
    _, shape = o.tail
    return out.view(o.batch, shape.out_height, shape.out_width, -1).permute(0, 3, 1, 2)


def reduce_weights(o: Operands) -> Kernel:
    windows = o.geometry.readers()

    def ours() -> Results:
        size = o.reduce.numel()
        flat = window_gradient(o.dz, o.raw, windows, size, norm=o.main, identity=o.identity, bits=None, eps=EPS)
        return {"gradient": flat.view_as(o.reduce)}

    def plain(dtype: torch.dtype) -> Results:
        x = o.raw.to(dtype)
        x = torch.cat([x[:, : o.identity], relu_of(x[:, o.identity :], o.main)], 1)
        return {"gradient": torch.cat([o.dz[j].to(dtype).t() @ x[:, o.window(j)] for j in range(o.count)])}

    return Kernel(ours, plain)


def transform_weights(o: Operands) -> Kernel:
    table, shape = pixel_table(o.geometry.inside, o.dy), (o.k, *o.transform.shape[1:])

    def ours() -> Results:
        size = o.transform.numel()
        flat = conv_gradient(o.dy, o.z, o.geometry.inside, size, norm=o.inner, table=table, eps=EPS)
        return {"gradient": flat.view_as(o.transform)}

    def plain(dtype: torch.dtype) -> Results:
        gradients = []
        for j in range(o.count):
            z = relu_of(o.images(o.z[j].to(dtype)), part(o.inner, o.own(j)))
            dy = o.images(o.dy[j].to(dtype))
            gradients.append(conv2d_weight(z, shape, dy, padding=1, groups=o.plan.subgroups))
        return {"gradient": torch.cat(gradients)}

    return Kernel(ours, plain)


def tail_weights(o: Operands) -> Kernel:
    (weight, shape), tail, first = o.tail, o.plan.tail, o.plan.total_channels - o.plan.read_channels
    assert tail is not None and tail.repeats == 1 and first >= o.identity
    d_out, x = o.normal(shape.out_pixels, shape.c_out), o.raw[:, first:]
    norm = part(o.main, slice(first - o.identity, None))
    table = None if shape.kernel == shape.stride == 1 else pixel_table(shape, d_out)

    def ours() -> Results:
        flat = conv_gradient(d_out[None], x[None], shape, weight.numel(), norm=norm, table=table, eps=EPS)
        return {"gradient": flat.view_as(weight)}

    def plain(dtype: torch.dtype) -> Results:
        images, grad, padding = o.images(relu_of(x.to(dtype), norm)), leaving(o, d_out.to(dtype)), tail.kernel_size // 2
        return {"gradient": conv2d_weight(images, weight.shape, grad, tail.stride, padding, groups=tail.groups)}

    return Kernel(ours, plain)


def activation(o: Operands) -> Kernel:
    z, norm, out = o.z[o.j], part(o.inner, o.own(o.j)), o.normal(o.pixels, o.k)

    def ours() -> Results:
        activate(z, out, norm, EPS)
        return {"activated": out}

    return Kernel(ours, lambda dtype: {"activated": relu_of(z.to(dtype), norm)})


def statistics(o: Operands) -> Kernel:
    channels, scratch = o.plan.in_channels, o.scratch()
    x, copy, mean, var = o.normal(o.pixels, channels), o.raw[:, :channels], o.vector(channels), o.vector(channels)

    def ours() -> Results:
        input_statistics(x, copy, BatchNorm(None, None, mean, var), scratch)
        return {"copy": copy, "mean": mean, "variance": var}

    def plain(dtype: torch.dtype) -> Results:
        var, mean = torch.var_mean(x.to(dtype), 0, correction=0)
        return {"copy": x.to(dtype, copy=True), "mean": mean, "variance": var}

    return Kernel(ours, plain)


FAMILIES: dict[str, Callable[[Operands], Kernel]] = {
    "convolution 1×1": reduce_forward,
    "convolution 3×3": transform_forward,
    "convolution tail": tail_forward,
    "pull 1×1": pull_backward,
    "transposed 3×3": transform_backward,
    "transposed tail": tail_backward,
    "weight gradient 1×1": reduce_weights,
    "weight gradient 3×3": transform_weights,
    "weight gradient tail": tail_weights,
    "elementwise": activation,
    "statistics": statistics,
}


def make(subject: str, batch: int, image: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel of "kernel FAMILY, MODEL stage NUMBER"."""
    family, stage = subject.removeprefix("kernel ").split(", ")
    plan, shape = stage_of(stage, image)
    return FAMILIES[family](Operands(plan, batch, shape.size, dtype, device))

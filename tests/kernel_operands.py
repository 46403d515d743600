"""Operands and float64 references for tests of single kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import error
from torch import Tensor

from seqconv_triton.kernels.launch import BatchNorm, ConvShape, NormGradient

EPS = 1e-5
NAN = float("nan")

# id: batch, height, width, kernel, stride, channels in, channels out, conv groups
CONVOLUTIONS = {
    "1x1": (3, 5, 7, 1, 1, 20, 24, 1),
    "3x3": (1, 7, 14, 3, 1, 8, 8, 1),
    "3x3-one-pixel": (3, 1, 1, 3, 1, 16, 16, 1),
    "3x3-pairs": (1, 5, 2, 3, 1, 8, 8, 4),
    "3x3-depthwise": (1, 2, 5, 3, 1, 24, 24, 24),
    "3x3-groups-wider-than-a-tile": (1, 5, 5, 3, 1, 48, 48, 2),
    "5x5": (1, 4, 3, 5, 1, 8, 16, 1),
    "5x5-stride-3": (1, 7, 8, 5, 3, 8, 16, 2),
    "stride-2": (2, 7, 5, 3, 2, 12, 24, 6),
    "stride-2-even": (1, 14, 2, 3, 2, 32, 64, 2),
    "1x1-stride-2": (1, 5, 4, 1, 2, 16, 16, 1),
    "channels-beyond-a-tile": (1, 2, 2, 1, 1, 8, 160, 1),
}


def shape_of(case: str) -> ConvShape:
    batch, height, width, kernel, stride, c_in, c_out, groups = CONVOLUTIONS[case]
    return ConvShape(batch, height, width, kernel, stride, c_out, c_in // groups, c_out // groups)


def random_norm(channels: int) -> BatchNorm:
    return BatchNorm(
        1 + 0.3 * torch.randn(channels), 0.3 * torch.randn(channels), 0.2 * torch.randn(channels),
        1 + torch.rand(channels),
    )  # fmt: skip


def normal(x: Tensor, norm: BatchNorm) -> Tensor:
    """BN of [P, C] in float64."""
    weight, bias, mean, var = (v.double() for v in norm)
    return (x.double() - mean) * (var + EPS).rsqrt() * weight + bias


def images(rows: Tensor, shape: ConvShape, out: bool = False) -> Tensor:
    size = (shape.out_height, shape.out_width) if out else (shape.height, shape.width)
    return rows.double().view(shape.batch, *size, -1).permute(0, 3, 1, 2)


def flat(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def conv(x: Tensor, weight: Tensor, shape: ConvShape) -> Tensor:
    """x [N, C, H, W], weight [c_out, c_in, kernel, kernel]."""
    return F.conv2d(x, weight.double(), None, shape.stride, shape.kernel // 2, 1, shape.c_out // shape.group_out)


def random_weight(shape: ConvShape) -> Tensor:
    size = (shape.c_out, shape.group_in, shape.kernel, shape.kernel)
    return torch.randn(size) / (shape.kernel**2 * shape.group_in) ** 0.5


def empty_gradient(channels: int) -> NormGradient:
    return NormGradient(*(torch.full(size, NAN) for size in ((channels,), (channels,), (3, channels))))


def nowhere(channels: int) -> BatchNorm:
    """A BN whose statistics are still to come."""
    return random_norm(channels)._replace(mean=torch.full((channels,), NAN), var=torch.full((channels,), NAN))


def assert_bn_backward(norm: BatchNorm, into: NormGradient, g: Tensor, raw: Tensor) -> None:
    """dγ, dβ and a·g + b·x + c equal autograd's on a BN whose mean and variance are those of `norm`."""
    rstd = (norm.var.double() + EPS).rsqrt()
    x = (raw.double() - norm.mean.double()) * rstd
    weight_grad, bias_grad = (g * x).sum(0), g.sum(0)
    assert error(into.weight, weight_grad) < 1e-5
    assert error(into.bias, bias_grad) < 1e-5
    exact = norm.weight.double() * rstd * (g - bias_grad / len(raw) - x * weight_grad / len(raw))
    a, b, c = into.coefficients
    assert error(a * g + b * raw + c, exact) < 1e-5 * max(1, (g.norm() / exact.norm()).item())

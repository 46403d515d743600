"""The stem's 3×3 convs: nn.Conv2d, which on a CPU under torch.compile goes through an op of our own.

PyTorch's CPU convolution chooses its kernel by `batch >= 16`, and torch.compile turns that choice into a guard: a model
compiled with a dynamic batch would be compiled again at 16 images. Behind an opaque op there is nothing to guard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seqconv_triton.backend import is_exporting
from seqconv_triton.backend.contract import empty_channels_last
from seqconv_triton.nn.layers import fan_out_uniform_
from seqconv_triton.nn.leaf import leaf
from seqconv_triton.ops.stage import autocast_dtype, no_autocast

aten = torch.ops.aten


@torch.library.custom_op("seqconv_triton::stem_conv", mutates_args=())
def stem_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    out = _fake(x, weight, stride)
    return out.copy_(aten.convolution(x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1))


@stem_conv.register_fake
def _fake(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    return empty_channels_last(x, weight.shape[0], height, width)


@torch.library.custom_op("seqconv_triton::stem_conv_backward", mutates_args=())
def stem_conv_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, stride: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    dx, dw, _ = aten.convolution_backward(
        d_out, x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [*needs, False]
    )
    out = _fake_backward(d_out, x, weight, stride, needs)
    for given, wanted, needed in zip((dx, dw), out, needs, strict=True):
        if needed:
            wanted.copy_(given)
    return out


@stem_conv_backward.register_fake
def _fake_backward(d_out: Tensor, x: Tensor, weight: Tensor, stride: int, needs: list[bool]) -> tuple[Tensor, Tensor]:
    dx, dw = (torch.empty_like(t) if needed else t.new_empty(0) for t, needed in zip((x, weight), needs, strict=True))
    return dx, dw


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, weight, ctx.stride = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    needs = list(ctx.needs_input_grad[:2])
    dx, dw = torch.ops.seqconv_triton.stem_conv_backward(d_out, *ctx.saved_tensors, ctx.stride, needs)
    return dx if needs[0] else None, dw if needs[1] else None, None


stem_conv.register_autograd(_backward, setup_context=_save)


class StemConv2d(nn.Conv2d):
    """A 3×3 conv with padding 1 and no bias, [N, C, H, W] → [N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, **where: Any) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1, bias=False, **where)

    def reset_parameters(self) -> None:
        """The published initialisation."""
        fan_out_uniform_(self.weight.detach(), self.out_channels * 9)
        if self.bias is not None:  # `fuse` puts one here
            nn.init.zeros_(self.bias)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.compiler.is_compiling() or is_exporting():
            return super().forward(x)
        weight = self.weight
        dtype = autocast_dtype(x)
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
        stride = self.stride[0]
        assert isinstance(stride, int)
        with no_autocast(x):
            out: Tensor = torch.ops.seqconv_triton.stem_conv(x, weight, stride)
            return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]

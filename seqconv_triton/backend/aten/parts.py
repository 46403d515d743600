"""Rows and images, and the convs of the aten backend on either."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def pixels(x: Tensor) -> Tensor:
    """A channels-last [N, C, H, W] tensor as rows of channels: [P, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class Images:
    """Turns rows of channels [P, C] back into [N, C, H, W] without a copy."""

    def __init__(self, x: Tensor) -> None:
        self.batch, _, self.height, self.width = x.shape

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.batch, self.height, self.width)).permute(0, 3, 1, 2)

    def pixel_mask(self, mask: Tensor) -> Tensor:
        """A channel mask [N, C] repeated for every pixel: [P, C]."""
        return mask[:, None].expand(-1, self.height * self.width, -1).reshape(-1, mask.shape[1])


def onednn_takes(x: Tensor) -> bool:
    """Whether PyTorch has oneDNN for what lies here."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()


def worth_onednn(grad: Tensor) -> bool:
    """Whether its 1×1 gradients repay reordered weights (docs/performance.md: below, the BLAS is as fast)."""
    return onednn_takes(grad) and grad.is_contiguous() and grad.shape[0] >= 256 and grad.shape[1] >= 16


def pointwise(rows: Tensor, weight: Tensor, bias: Tensor | None, images: Images) -> Tensor:
    """1×1 conv of rows [P, C] with weight [k, C]: [P, k].

    On AMD processors oneDNN's products are twice as fast as those of the BLAS that PyTorch brings, so that it even pays
    to close the gaps between rows for it.
    """
    if onednn_takes(rows):
        return pixels(convolution(images(rows.contiguous()), weight[:, :, None, None], bias))
    return rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, groups: int = 1) -> Tensor:
    """Conv with a padding that keeps the image size at stride 1.

    Straight to oneDNN where it is: PyTorch itself passes it by for single small images, at several times the cost.
    """
    padding = weight.shape[-1] // 2
    if onednn_takes(x):
        return torch.mkldnn_convolution(x, weight, bias, (padding,) * 2, (stride,) * 2, (1, 1), groups)
    return F.conv2d(x, weight, bias, stride, padding, 1, groups)


def add_product_(into: Tensor, rows: Tensor, weight: Tensor, images: Images) -> None:
    """into [P, C] += rows [P, k] @ weight [k, C], all without gaps, through oneDNN, which can add as it stores."""
    add_in_place = torch.ops.mkldnn._convolution_pointwise_.binary
    one = (1, 1)
    weight = weight.t()[:, :, None, None]
    add_in_place(images(into), images(rows), weight, None, (0, 0), one, one, 1, "add", None, None, [], None)


def product_over_pixels(grad: Tensor, rows: Tensor, images: Images) -> Tensor:
    """grad [P, k] transposed times rows [P, C], through oneDNN: the weight gradient of `pointwise`."""
    like = rows.new_empty(grad.shape[1], rows.shape[1], 1, 1)
    one, none = [1, 1], [0, 0]
    dw: Tensor = aten.convolution_backward(
        images(grad), images(rows), like, None, one, none, one, False, none, 1, [False, True, False]
    )[1]
    return dw.flatten(1)

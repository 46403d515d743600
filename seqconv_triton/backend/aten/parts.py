"""What the aten backend's passes share: rows and images, convs on either, BN, a stage's groups, shortcuts."""

from __future__ import annotations

from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend.aten.ring import ring_of
from seqconv_triton.backend.contract import NormVectors, StageArguments
from seqconv_triton.backend.packing import reduce_matrices, transform_weights
from seqconv_triton.plan import Plan

aten = torch.ops.aten


def pixels(x: Tensor) -> Tensor:
    """A channels-last [N, C, H, W] tensor as rows of channels: [P, C]."""
    (n, c, h, w), (image, channel, line, pixel) = x.shape, x.stride()
    if line == w * pixel and image == h * line:  # one op instead of two: groups are many
        return x.as_strided((n * h * w, c), (pixel, channel))
    return x.permute(0, 2, 3, 1).reshape(-1, c)


class Images:
    """Turns rows of channels [P, C] back into [N, C, H, W] without a copy."""

    def __init__(self, x: Tensor) -> None:
        self.batch, _, self.height, self.width = x.shape

    def __call__(self, rows: Tensor) -> Tensor:
        (pixel, channel), line = rows.stride(), self.width * rows.stride(0)
        size = (self.batch, rows.shape[1], self.height, self.width)
        return rows.as_strided(size, (self.height * line, channel, line, pixel))

    def pixel_mask(self, mask: Tensor) -> Tensor:
        """A channel mask [N, C] repeated for every pixel: [P, C]."""
        return mask[:, None].expand(-1, self.height * self.width, -1).reshape(-1, mask.shape[1])


def onednn_takes(x: Tensor) -> bool:
    """Whether PyTorch has oneDNN for what lies here."""
    return x.dtype == torch.float32 and x.is_cpu and _onednn()


@cache
def _onednn() -> bool:
    return torch.backends.mkldnn.is_available()


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


class Norm:
    """BNs of channels from `first` on. Batch statistics are taken and stored, running ones are only applied.

    What the groups give, statistics or gradients, is noted and stored for all of them at once: a write for each would
    cost as much time as its BN.
    """

    def __init__(self, vectors: NormVectors, stage: StageArguments, first: int = 0) -> None:
        weight, bias, mean, var = vectors
        if mean is None or var is None:
            mean, var = torch.zeros_like(bias), torch.ones_like(bias)
        self.weight, self.bias, self.mean, self.var, self.eps = weight, bias, mean, var, stage.eps
        self.batch, self.ranks, self.first = stage.statistics == "batch", stage.ranks, first
        self.noted: list[tuple[int, Tensor, Tensor]] = []  # first channel, and two vectors

    @cached_property
    def inverse(self) -> Tensor:
        return (self.var + self.eps).rsqrt()

    def _parts(self, raw: Tensor, start: int, *vectors: Tensor) -> list[Tensor]:
        """Those of the channels of raw, [start, …)."""
        return [vector.narrow(0, start - self.first, raw.shape[1]) for vector in vectors]

    def normalize(self, raw: Tensor, start: int) -> Tensor:
        """BN of channels [start, …) in the forward pass; in training it takes their statistics."""
        if not self.batch:
            return self.apply(raw, start)
        if self.ranks is not None:
            own_var, own_mean = torch.var_mean(raw.to(self.mean.dtype), (0, 2, 3), correction=0)
            mean, var = self._parts(raw, start, self.mean, self.var)
            for into, value in zip((mean, var), self.ranks.statistics(own_mean, own_var), strict=True):
                into.copy_(value)
            return self.apply(raw, start)
        weight, bias = self._parts(raw, start, self.weight, self.bias)
        out, batch_mean, inverse = torch.native_batch_norm(raw, weight, bias, None, None, True, 0.0, self.eps)
        self.noted.append((start, batch_mean, inverse))
        return out

    def store_statistics(self) -> None:
        """Of all channels that were normalized, where no rank's were stored before."""
        if self.noted:
            mean, inverse = self._collected()
            self.mean.copy_(mean)
            # Running statistics need the variance; the kernel returns 1/√(variance + eps).
            torch.sub(inverse.pow_(-2), self.eps, out=inverse)
            self.var.copy_(inverse.clamp_min_(0))

    def apply(self, raw: Tensor, start: int) -> Tensor:
        """BN of channels [start, …) with known statistics."""
        weight, bias, mean, var = self._parts(raw, start, self.weight, self.bias, self.mean, self.var)
        out: Tensor = torch.native_batch_norm(raw, weight, bias, mean, var, False, 0.0, self.eps)[0]
        return out

    def backward(self, grad: Tensor, raw: Tensor, start: int) -> Tensor:
        """Gradient of BN on channels [start, …): returns that of raw, notes those of the affine."""
        vectors = self.weight, self.mean, self.var, self.inverse
        weight, mean, var, inverse = self._parts(raw, start, *vectors)
        if self.batch and self.ranks is not None:
            precise = grad.to(mean.dtype)
            normal = (raw.to(mean.dtype) - mean[:, None, None]) * inverse[:, None, None]
            sums = torch.stack([precise.sum((0, 2, 3)), (precise * normal).sum((0, 2, 3))])
            self.noted.append((start, sums[1], sums[0]))
            mean_g, mean_gx = self.ranks.means(sums)[:, :, None, None].unbind()
            return ((precise - mean_g - normal * mean_gx) * (weight * inverse)[:, None, None]).to(raw.dtype)
        d_raw, d_weight, d_bias = aten.native_batch_norm_backward(
            grad, raw, weight, mean, var, mean, inverse, self.batch, self.eps, [True, True, True]
        )
        self.noted.append((start, d_weight, d_bias))
        return d_raw

    def store_gradients(self, d_weight: Tensor, d_bias: Tensor) -> None:
        """Of the affine of all channels."""
        for into, found in zip((d_weight, d_bias), self._collected(), strict=True):
            into.copy_(found)

    def _collected(self) -> tuple[Tensor, Tensor]:
        """What was noted of all channels, in their order."""
        _, first, second = zip(*sorted(self.noted, key=lambda entry: entry[0]), strict=True)
        self.noted = []
        return torch.cat(first), torch.cat(second)


class Groups:
    """A stage's groups on images like `like`, every BN on its own; z [J, N, H, W, k] is filled where it is kept.

    Weights and masks over windows lie as the ring's columns do.
    """

    def __init__(self, stage: StageArguments, like: Tensor, z: Tensor | None = None) -> None:
        plan, (main, inner) = stage.plan, stage.norms
        self.plan, self.ring, self.images, self.z = plan, ring_of(plan), Images(like), z
        self.norm = Norm(main, stage, plan.total_channels - plan.normalized_channels)
        self.inner = None if inner is None else Norm(inner, stage)
        self.reduce = reduce_matrices(stage.convs.reduce, plan)
        self.transform = transform_weights(stage.convs.transform, plan)
        self.subgroups = plan.subgroups if plan.bottleneck else 1

    def placed_reduce(self, j: int) -> Tensor:
        return self.ring.place(self.reduce[j], j)

    def placed_transform(self, j: int) -> Tensor:
        return self.transform[j] if self.plan.bottleneck else self.ring.place(self.transform[j], j)

    def activate_input(self, x: Tensor, pieces: list[tuple[slice, Tensor]]) -> None:
        """Fill the columns of the input, given as parts of its channels and where each belongs."""
        rows = pixels(self.norm.normalize(x, 0)) if self.plan.raw_input else pixels(x)
        for part, into in pieces:
            torch.clamp_min(rows[:, part], 0, out=into) if self.plan.raw_input else into.copy_(rows[:, part])

    def store_statistics(self) -> None:
        """Behind the last group."""
        self.norm.store_statistics()
        if self.inner is not None:
            self.inner.store_statistics()

    def convolve(self, j: int, window: Tensor) -> Tensor:
        """Group j's convs over what it reads, rows [P, columns]: its raw output [N, k, H, W]."""
        if self.inner is not None:
            k = self.plan.group_width
            z = pointwise(window, self.placed_reduce(j), None, self.images)
            if self.z is not None:
                self.z[j].view(-1, k).copy_(z)
            window = pixels(self.inner.normalize(self.images(z), j * k).relu_())
        return convolution(self.images(window), self.placed_transform(j), None, 1, self.subgroups)

    def activate(self, j: int, y: Tensor, into: Tensor) -> None:
        """BN-ReLU of group j's raw output, to rows."""
        torch.clamp_min(pixels(self.norm.normalize(y, self.plan.slot(j))), 0, out=into)


class Shortcuts:
    """What is added to the raw outputs of layers B: raw channels kept until then, or a single layer's shortcut."""

    def __init__(self, plan: Plan, rows: Tensor, shortcut: Tensor | None) -> None:
        self.plan, self.shortcut, k = plan, shortcut, plan.group_width
        self.awaited = {group.residual_start for group in plan.groups}
        self.raw = {c: rows[:, c : c + k] for c in self.awaited if c is not None and c < plan.in_channels}

    def pass_on(self, j: int, y: Tensor, images: Images) -> None:
        """Add to y [N, k, H, W], group j's 3×3 conv, what belongs there, and remember it where it is added later."""
        start, k = self.plan.groups[j].residual_start, self.plan.group_width
        if self.shortcut is not None:
            y += self.shortcut[:, j * k : (j + 1) * k]
        elif start is not None:
            y += images(self.raw.pop(start))
        if self.plan.slot(j) in self.awaited:
            self.raw[self.plan.slot(j)] = pixels(y)

"""BN of a stage's packed channels in the aten backend, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from seqconv_triton.backend.contract import NormVectors, StageArguments

aten = torch.ops.aten


class Norm:
    """BNs of channels from `first` on. Batch statistics are taken and stored, running ones are only applied."""

    def __init__(self, vectors: NormVectors, stage: StageArguments, first: int = 0) -> None:
        weight, bias, mean, var = vectors
        if mean is None or var is None:
            mean, var = torch.zeros_like(bias), torch.ones_like(bias)
        self.weight, self.bias, self.mean, self.var, self.eps = weight, bias, mean, var, stage.eps
        self.batch, self.ranks, self.first = stage.statistics == "batch", stage.ranks, first

    def _channels(self, start: int, raw: Tensor) -> slice:
        return slice(start - self.first, start - self.first + raw.shape[1])

    def normalize(self, raw: Tensor, start: int) -> Tensor:
        """BN of channels [start, …) in the forward pass; in training it takes their statistics."""
        if not self.batch:
            return self.apply(raw, start)
        channels = self._channels(start, raw)
        if self.ranks is not None:
            var, mean = torch.var_mean(raw.to(self.mean.dtype), (0, 2, 3), correction=0)
            self.mean[channels], self.var[channels] = self.ranks.statistics(mean, var)
            return self.apply(raw, start)
        weight, bias = self.weight[channels], self.bias[channels]
        out, mean, inverse = torch.native_batch_norm(raw, weight, bias, None, None, True, 0.0, self.eps)
        self.mean[channels] = mean
        # Running statistics need the variance; the kernel returns 1/√(variance + eps).
        self.var[channels] = (inverse.pow(-2) - self.eps).clamp_min(0)
        return out

    def apply(self, raw: Tensor, start: int) -> Tensor:
        """BN of channels [start, …) with known statistics."""
        channels = self._channels(start, raw)
        weight, bias, mean, var = (t[channels] for t in (self.weight, self.bias, self.mean, self.var))
        out: Tensor = torch.native_batch_norm(raw, weight, bias, mean, var, False, 0.0, self.eps)[0]
        return out

    def backward(self, grad: Tensor, raw: Tensor, start: int, d_weight: Tensor, d_bias: Tensor) -> Tensor:
        """Gradient of BN on channels [start, …): writes those of the affine, returns that of raw."""
        channels = self._channels(start, raw)
        mean, var, weight = self.mean[channels], self.var[channels], self.weight[channels]
        inverse = (var + self.eps).rsqrt()
        if self.batch and self.ranks is not None:
            precise = grad.to(mean.dtype)
            normal = (raw.to(mean.dtype) - mean[:, None, None]) * inverse[:, None, None]
            sums = torch.stack([precise.sum((0, 2, 3)), (precise * normal).sum((0, 2, 3))])
            d_bias[channels], d_weight[channels] = sums
            mean_g, mean_gx = self.ranks.means(sums)[:, :, None, None].unbind()
            return ((precise - mean_g - normal * mean_gx) * (weight * inverse)[:, None, None]).to(raw.dtype)
        d_raw, d_weight[channels], d_bias[channels] = aten.native_batch_norm_backward(
            grad, raw, weight, mean, var, mean, inverse, self.batch, self.eps, [True, True, True]
        )
        return d_raw

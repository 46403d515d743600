"""A SeqConv layer written out in PyTorch's own modules: what a user would compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import error, randomise
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.backend.packing import transform_weights, window_weights

VECTORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class PlainLayer(nn.Module):
    """nn.Conv2d, nn.BatchNorm2d and ReLU for every group of a windowed layer, with its weights and statistics."""

    def __init__(self, layer: sct.SeqConv2d) -> None:
        super().__init__()
        plan = self.plan = layer.plan
        k, groups, kernel = plan.group_width, len(plan.groups), 1 if plan.bottleneck else 3
        firsts = [nn.Conv2d(plan.in_channels, k, kernel, padding=kernel // 2, bias=False) for _ in range(groups)]
        seconds = [nn.Conv2d(k, k, 3, padding=1, groups=plan.subgroups, bias=False) for _ in range(groups)]
        self.reduce = nn.ModuleList(firsts if plan.bottleneck else [])
        self.transform = nn.ModuleList(seconds if plan.bottleneck else firsts)
        self.norms = nn.ModuleList(nn.BatchNorm2d(k) for _ in range(groups))
        self.reduce_norms = nn.ModuleList(nn.BatchNorm2d(k) for _ in range(groups if plan.bottleneck else 0))
        self.to(layer.transform_weight.dtype)
        with torch.no_grad():
            for conv, weight in zip(self.transform, transform_weights(layer.transform_weight, plan), strict=True):
                conv.weight.copy_(weight)
            if layer.reduce_weight is not None:
                for conv, weight in zip(self.reduce, window_weights(layer.reduce_weight, plan, 1), strict=True):
                    conv.weight.copy_(weight)
            for packed, norms in ((layer.norm, self.norms), (layer.reduce_norm, self.reduce_norms)):
                for i, norm in enumerate(norms):
                    for vector in VECTORS[:4]:
                        getattr(norm, vector).copy_(getattr(packed, vector)[i * k : (i + 1) * k])

    def bn_modules(self) -> list[tuple[str, nn.Module]]:
        """Every BN with the name of the packed one that stands for it, in the order of its channels."""
        return [("norm", norm) for norm in self.norms] + [("reduce_norm", norm) for norm in self.reduce_norms]

    def replace(self, make: Callable[[nn.Module], nn.Module]) -> None:
        for norms in (self.norms, self.reduce_norms):
            for i, norm in enumerate(norms):
                norms[i] = make(norm)

    def vector(self, which: str, name: str) -> Tensor | None:
        """A vector of all BNs together, or the counter of the first."""
        parts = [getattr(norm, name, None) for kind, norm in self.bn_modules() if kind == which]
        if any(part is None for part in parts):
            return None
        return parts[0] if name == "num_batches_tracked" else torch.cat(parts)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for i, (conv, norm) in enumerate(zip(self.transform, self.norms, strict=True)):
            seen = torch.cat(features, 1)[:, -self.plan.in_channels :]
            if self.plan.bottleneck:
                seen = torch.relu(self.reduce_norms[i](self.reduce[i](seen)))
            features.append(torch.relu(norm(conv(seen))))
        return torch.cat(features[1:], 1)


def pair(dtype: torch.dtype = torch.float64, **options: object) -> tuple[sct.SeqConv2d, PlainLayer]:
    """A layer of three groups, and the same in plain modules."""
    layer = randomise(sct.SeqConv2d(6, 12, 4, dtype=dtype, **options))
    return layer, PlainLayer(layer)


def assert_alike(layer: sct.SeqConv2d, plain: PlainLayer, tolerance: float = 1e-10) -> None:
    """One pass forward and backward: outputs, gradients, and all that the BNs hold afterwards."""
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), plain(x)
    assert error(out, expected) < tolerance
    wave = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    weights = [norm.weight for _, norm in plain.bn_modules() if isinstance(getattr(norm, "weight", None), nn.Parameter)]
    got = torch.autograd.grad(out, [x, layer.transform_weight], wave)
    wanted = torch.autograd.grad(expected, [x, *(conv.weight for conv in plain.transform), *weights], wave)
    groups = len(plain.transform)
    assert error(got[0], wanted[0]) < tolerance
    assert error(got[1], torch.cat(wanted[1 : 1 + groups])) < tolerance
    for which in ("norm", "reduce_norm") if plain.plan.bottleneck else ("norm",):
        for vector in VECTORS:
            found, value = getattr(getattr(layer, which), vector, None), plain.vector(which, vector)
            assert (found is None) == (value is None), (which, vector)
            assert found is None or error(found, value) < tolerance, (which, vector)

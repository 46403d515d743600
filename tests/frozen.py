"""Frozen BNs as people write them: fixed statistics, in training too."""

from __future__ import annotations

from collections.abc import Callable

from plain import VECTORS
from torch import Tensor, nn


class FrozenModule(nn.Module):
    """As torchvision's FrozenBatchNorm2d and its relatives: buffers, and a forward of its own."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for vector in VECTORS[:4]:
            self.register_buffer(vector, getattr(norm, vector).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class FrozenWithAffine(FrozenModule):
    """Statistics fixed, weight and bias trained."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)
        for vector in ("weight", "bias"):
            value = self._buffers.pop(vector)
            self.register_parameter(vector, nn.Parameter(value))


class FrozenSubclass(nn.BatchNorm2d):
    """A BatchNorm2d whose forward never looks at the batch."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, dtype=norm.weight.dtype)
        self.load_state_dict(norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class AlwaysInEvaluation(nn.BatchNorm2d):
    """The other way people freeze: a train() that does nothing."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, dtype=norm.weight.dtype)
        self.load_state_dict(norm.state_dict())
        self.train()

    def train(self, mode: bool = True) -> AlwaysInEvaluation:
        return super().train(False)


def replace(module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make(child))
        else:
            replace(child, make)
    return module

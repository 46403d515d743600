"""How each data set is trained: the paper's settings (SGD, Nesterov momentum, steps of the learning rate)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The paper's CIFAR recipe by default, with its two drops of the learning rate at the same fractions of `epochs`.

    Weight decay goes to every parameter, BN and biases included. `drops` are fractions of the epochs after which the
    learning rate is divided by 10. Raises ValueError, naming the setting, for one that is out of range.
    """

    epochs: int
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    drops: tuple[float, ...] = (1 / 2, 3 / 4)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate ({self.learning_rate}) must be above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum ({self.momentum}) must be at least 0 and below 1")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay ({self.weight_decay}) must be at least 0")
        if any(not 0 < drop <= 1 for drop in self.drops):
            raise ValueError(f"drops {self.drops} must be above 0 and at most 1: fractions of the epochs")

    @property
    def milestones(self) -> tuple[int, ...]:
        """The epochs after which the learning rate drops; the first epoch always has the full one."""
        return tuple(max(1, round(self.epochs * fraction)) for fraction in self.drops)

    def learning_rate_in(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 1."""
        return self.learning_rate / 10 ** sum(milestone < epoch for milestone in self.milestones)


@dataclass(frozen=True)
class Preset:
    """A data set's recipe, the model trained on it unless another is named, and its options."""

    recipe: Recipe
    model: str
    model_options: dict[str, int | bool]


CIFAR = Recipe(epochs=300)  # ÷10 after epochs 150 and 225
IMAGENET = Recipe(epochs=100, batch_size=256, drops=(0.3, 0.6, 0.9))

PRESETS = {
    "digits": Preset(Recipe(epochs=16), "cifar_custom", {"group_width": 16, "widen": 2, "bottleneck": True}),
    "cifar10": Preset(CIFAR, "cifar_seqresnet_r4_k8", {}),
    "cifar100": Preset(CIFAR, "cifar_seqresnet_r4_k8", {}),
    "imagefolder": Preset(IMAGENET, "seqresnet_b22", {}),
}

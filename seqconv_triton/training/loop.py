"""The training loop: SGD with Nesterov momentum, the learning rate divided by 10 twice, and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """The paper's CIFAR recipe, with its two drops of the learning rate at the same fractions of fewer epochs."""

    epochs: int
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    drops: tuple[float, float] = (1 / 2, 3 / 4)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")

    @property
    def milestones(self) -> list[int]:
        """The epochs after which the learning rate drops."""
        return [round(self.epochs * fraction) for fraction in self.drops]


@dataclass
class History:
    """What was measured after every epoch; `seconds` counts the training alone, not the evaluation."""

    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    model: nn.Module,
    epoch_batches: Callable[[], Iterable[Batch]],
    test: Batch,
    recipe: Recipe,
    *,
    on_batch: Callable[[int, float], None] = lambda images, loss: None,
    on_epoch: Callable[[History], None] = lambda history: None,
) -> History:
    """Train on `epoch_batches()` an epoch, evaluate on `test` after each; the callbacks show progress and save."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, recipe.milestones, gamma=0.1)
    history = History()
    for _ in range(recipe.epochs):
        start = time.perf_counter()
        history.train_loss.append(train_epoch(model, epoch_batches(), optimizer, device, on_batch))
        history.seconds += time.perf_counter() - start
        schedule.step()
        images, labels = test
        right = predict(model, images).argmax(1) == labels
        history.test_accuracy.append(right.double().mean().item())
        on_epoch(history)
    return history


def train_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    on_batch: Callable[[int, float], None],
) -> float:
    """The mean cross-entropy per image, in nats. Raises FloatingPointError if the loss is no longer finite."""
    model.train()
    total, count = 0.0, 0
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} after {count} images of this epoch: training has diverged")
        loss.backward()
        optimizer.step()
        total, count = total + value * len(labels), count + len(labels)
        on_batch(len(labels), value)
    return total / count


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Class probabilities [N, classes], on the CPU, of normalised images [N, C, H, W]."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(batch.to(device)).softmax(1).cpu() for batch in images.split(batch_size)])

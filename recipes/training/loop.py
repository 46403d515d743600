"""The training loop: one step over the pieces of a batch, one epoch, evaluation; and `fit`, enough for a demo."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recipes.training.distributed import Ranks
from recipes.training.recipe import Recipe

Batch = tuple[Tensor, Tensor]
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A model with its optimizer, and all that one step depends on.

    Several ranks wrap the model in DistributedDataParallel; `model` stays the bare one.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        ranks: Ranks,
        *,
        amp: str | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        ema: float = 0.0,
    ) -> None:
        self.model, self.ranks = model, ranks
        self.label_smoothing, self.mixup = label_smoothing, mixup
        self.amp = None if amp is None else AMP[amp]
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum,
            weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=amp == "fp16")
        self.averaged: AveragedModel | None = None
        if ema:
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
        self.dtype = next(model.parameters()).dtype
        self.parallel = ranks.parallel(model)

    def autocast(self) -> Any:
        return torch.autocast(self.ranks.device.type, self.amp, enabled=self.amp is not None)

    def step(self, pieces: Iterable[Batch], count: int) -> Tensor:
        """One optimizer step over this rank's pieces of a global batch of `count` images.

        Returns [sum of the cross-entropy in nats, wrong predictions] of the pieces, on the device: nothing waits for
        them here. The gradient is that of the mean over the global batch, however it is divided.
        """
        self.optimizer.zero_grad()
        totals = torch.zeros(2, dtype=self.ranks.sums_dtype, device=self.ranks.device)
        pieces = list(pieces)
        for i, (images, labels) in enumerate(pieces):
            images = images.to(self.ranks.device, self.dtype, non_blocking=True)
            labels = labels.to(self.ranks.device, non_blocking=True)
            unfinished = i < len(pieces) - 1
            with self._without_exchange() if unfinished else nullcontext():
                with self.autocast():
                    loss, wrong = self._loss(images, labels)
                # DistributedDataParallel divides the summed gradients by the number of ranks.
                self.scaler.scale(loss * (self.ranks.world / count)).backward()
            totals += torch.stack([loss.detach(), wrong])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return totals

    def _without_exchange(self) -> Any:
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of wrong predictions; under mixup (Zhang et al., 2018) of the larger share."""
        share, other = 1.0, labels
        if self.mixup:
            share = torch.distributions.Beta(self.mixup, self.mixup).sample().item()
            images, other = share * images + (1 - share) * images.flip(0), labels.flip(0)
        logits = self.parallel(images)
        loss = share * self._cross_entropy(logits, labels)
        if share < 1:
            loss = loss + (1 - share) * self._cross_entropy(logits, other)
        return loss, (logits.detach().argmax(1) != (labels if share >= 0.5 else other)).sum()

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)


@dataclass
class Sums:
    """What an epoch has added up so far, over all ranks; `seconds` of training."""

    images: int = 0
    loss: float = 0.0
    wrong: float = 0.0
    seconds: float = 0.0


class Meter:
    """Collects the totals of steps and reads them from the device every so many: the one place that waits for it.

    `step` counts the epoch's steps. `noted()` is the signal that this process has received (0: none); `stop` is one
    that any rank had received when the totals were last read, so that all stop after the same step.
    """

    def __init__(
        self, ranks: Ranks, sums: Sums | None = None, step: int = 0, noted: Callable[[], int] = lambda: 0
    ) -> None:
        self.ranks, self.sums, self.step, self.stop = ranks, sums or Sums(), step, 0
        self._noted = noted
        self._every = 1 if ranks.device.type == "cpu" else 10
        self._waiting: list[tuple[Tensor, int]] = []
        self._since = time.perf_counter()

    @property
    def is_read(self) -> bool:
        """Whether `sums` holds every step."""
        return not self._waiting

    def add(self, totals: Tensor, count: int) -> None:
        self.step += 1
        self._waiting.append((totals, count))
        if len(self._waiting) == self._every:
            self.read()

    def read(self) -> None:
        """Wait for all steps so far. Raises FloatingPointError, naming the step, for a loss that is not finite."""
        number = self._noted()
        flags = [number == signal.SIGINT, number == signal.SIGTERM]
        rows = [totals for totals, _ in self._waiting]
        rows.append(torch.tensor(flags, dtype=self.ranks.sums_dtype, device=self.ranks.device))
        *values, (interrupted, terminated) = self.ranks.sum_(torch.stack(rows)).tolist()
        for i, ((loss, wrong), (_, count)) in enumerate(zip(values, self._waiting, strict=True)):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} in step {self.step - len(values) + i + 1}")
            self.sums.loss, self.sums.wrong = self.sums.loss + loss, self.sums.wrong + wrong
            self.sums.images += count
        self._waiting = []
        self.stop = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
        now = time.perf_counter()
        self.sums.seconds, self._since = self.sums.seconds + now - self._since, now

    def restart_clock(self) -> None:
        """Time since the last read was not training."""
        self._since = time.perf_counter()


def train_epoch(
    trainer: Trainer,
    batches: Iterable[tuple[Iterable[Batch], int]],
    meter: Meter,
    *,
    before: Callable[[int], None] = lambda step: None,
    after: Callable[[Meter], None] = lambda meter: None,
) -> Sums:
    """Steps over `batches`, (this rank's pieces, images of the global batch) each.

    `before(step)` and `after(meter)` surround every step. Raises FloatingPointError if a loss is not finite.
    """
    trainer.model.train()
    for pieces, count in batches:
        before(meter.step)
        meter.add(trainer.step(pieces, count), count)
        after(meter)
    meter.read()
    return meter.sums


@dataclass(frozen=True)
class Evaluation:
    """Means over `images`: cross-entropy in nats, errors in per cent (top-5: None with five classes or fewer)."""

    images: int
    loss: float
    error: float
    top5_error: float | None


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], ranks: Ranks, autocast: Callable[[], Any] = nullcontext
) -> Evaluation:
    """Loss and errors over all ranks' batches. Raises ValueError where there is not one image."""
    model.eval()
    dtype = next(model.parameters()).dtype
    totals = torch.zeros(4, dtype=ranks.sums_dtype, device=ranks.device)
    classes = 0
    for images, labels in batches:
        labels = labels.to(ranks.device, non_blocking=True)
        with autocast():
            logits = model(images.to(ranks.device, dtype, non_blocking=True))
        classes = logits.shape[1]
        loss = F.cross_entropy(logits.to(totals.dtype), labels, reduction="sum")
        hits = logits.topk(min(5, classes)).indices == labels[:, None]
        totals += torch.stack([loss, (~hits[:, 0]).sum(), (~hits.any(1)).sum(), loss.new_tensor(len(labels))])
    loss, wrong, wrong5, count = ranks.sum_(totals).tolist()
    if not count:
        raise ValueError("there is not one image to evaluate on")
    return Evaluation(int(count), loss / count, 100 * wrong / count, 100 * wrong5 / count if classes > 5 else None)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Class probabilities [N, classes], on the CPU, of normalised images [N, C, H, W]."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(batch.to(device)).softmax(1).cpu() for batch in images.split(batch_size)])


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
    """Train in memory on `epoch_batches()` an epoch, evaluate on `test` after each; the callbacks show progress."""
    ranks = Ranks(next(model.parameters()).device)
    trainer, history = Trainer(model, recipe, ranks), History()

    def batches() -> Iterator[tuple[list[Batch], int]]:
        for images, labels in epoch_batches():
            yield [(images, labels)], len(labels)

    for epoch in range(1, recipe.epochs + 1):
        set_learning_rate(trainer.optimizer, recipe.learning_rate_in(epoch))
        seen = Sums()

        def after(meter: Meter, seen: Sums = seen) -> None:
            new = meter.sums.images - seen.images
            if new:
                on_batch(new, (meter.sums.loss - seen.loss) / new)
                seen.images, seen.loss = meter.sums.images, meter.sums.loss

        sums = train_epoch(trainer, batches(), Meter(ranks), after=after)
        history.train_loss.append(sums.loss / sums.images)
        history.seconds += sums.seconds
        history.test_accuracy.append(
            1 - evaluate(model, zip(*(part.split(256) for part in test), strict=True), ranks).error / 100
        )
        on_epoch(history)
    return history


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate

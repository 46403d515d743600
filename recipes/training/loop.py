"""One epoch: steps, what they add up to, and the one place that waits for the device."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.training.distributed import Ranks
from recipes.training.source import Batch
from recipes.training.trainer import Trainer


@dataclass
class Sums:
    """What an epoch has added up so far, over all ranks; `seconds` of training."""

    images: int = 0
    loss: float = 0.0
    wrong: float = 0.0
    seconds: float = 0.0


class Meter:
    """Collects the totals of steps and reads them from the device every so many: the one place that waits for it.

    `step` counts the epoch's steps. `received()` is the signal that this process got (0: none); `stop` is one that any
    rank had got when the totals were last read, so that all stop after the same step.
    """

    def __init__(
        self, ranks: Ranks, sums: Sums | None = None, step: int = 0, received: Callable[[], int] = lambda: 0
    ) -> None:
        self.ranks, self.sums, self.step, self.stop = ranks, sums or Sums(), step, 0
        self._received = received
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
        number = self._received()
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

"""`train`: a whole run, from a Config to checkpoints and a log; it goes on from its last checkpoint to the same bits.

Its position is (finished epochs, steps of the next one). Everything else that matters is in the checkpoint (weights,
optimizer, scaler, averaged weights, sums of the epoch), or follows from seed and position (order.py): order of the
images, augmentation, dropout. So the main process can save at any step without the others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from recipes.training import architecture, checkpoint
from recipes.training.config import Config, differences
from recipes.training.data import open_source
from recipes.training.determinism import deterministic
from recipes.training.distributed import Ranks, processes
from recipes.training.evaluation import Evaluation, evaluate
from recipes.training.interrupts import Interrupts, Stopped
from recipes.training.log import Log, Progress, Row
from recipes.training.loop import Meter, Sums, train_epoch
from recipes.training.order import (
    epoch_order,
    evaluation_pieces,
    seed_everything,
    shares,
    steps_per_epoch,
)
from recipes.training.run_files import RunFiles
from recipes.training.skipped import Skipped
from recipes.training.source import Batch, Source
from recipes.training.trainer import build_trainer


@dataclass(frozen=True)
class Outcome:
    """A finished run: its folder, epochs, smallest validation error in per cent, and the images it had to skip."""

    output: Path
    epochs: int
    best_error: float
    unreadable: tuple[str, ...]


def train(config: Config) -> Outcome:
    """Train as `config` says, in this process or in all that torchrun started.

    Raises ValueError for settings, data or checkpoints that do not fit, OSError where files cannot be read or written,
    ImportError naming the extra for a missing package, FloatingPointError for a loss that is not finite, and Stopped
    (a KeyboardInterrupt), after saving, for Ctrl-C and SIGTERM.
    """
    before = _last_state(config)
    with deterministic(config.deterministic), Interrupts() as interrupts, processes(config.device) as ranks:
        source = open_source(config, pinned=ranks.device.type == "cuda")
        try:
            run = Run(config, source, ranks, interrupts)
            if before is not None:
                run.restore(before)
            return run.to_the_end()
        finally:
            source.close()


def _last_state(config: Config) -> dict[str, Any] | None:
    """What the run is resumed from. Raises ValueError where there is a run that is not to be resumed, or another."""
    if config.output.is_file():
        raise ValueError(f"output ({config.output}) is a file, not a folder")
    last = config.output / "last.pt"
    if not last.exists():
        return None
    if not config.resume:
        raise ValueError(f"{config.output} holds a run already: go on with it (--resume), or name another --output")
    state = checkpoint.load(last)
    if changed := differences(state["config"], config.binding()):
        raise ValueError(
            f"{last} was trained with other settings: {'; '.join(changed)}. Give the former ones to go on, or name "
            "another --output to begin anew"
        )
    return state


class Run:
    """A run's parts and its position."""

    def __init__(self, config: Config, source: Source, ranks: Ranks, interrupts: Interrupts) -> None:
        self.config, self.source, self.ranks, self.interrupts = config, source, ranks, interrupts
        self.recipe = config.recipe
        pieces = ranks.world * config.accumulate
        self.steps = steps_per_epoch(source.train_images, self.recipe.batch_size, pieces)
        if not self.steps:
            raise ValueError(f"{source.train_images} training images are too few for {pieces} pieces a step")
        self.arch = config.arch(len(source.classes), source.preprocess.channels)
        self.trainer = build_trainer(config, self.arch, ranks)
        self.epoch, self.meter = 0, Meter(ranks)
        self.best_error: float | None = None
        self.files = RunFiles(config.output)
        self.log: Log | None = None
        self._rows: list[dict[str, Any]] = []
        self.skipped = Skipped(ranks, source.unreadable)

    def restore(self, state: dict[str, Any]) -> None:
        """Take everything from a checkpoint. Raises ValueError where it does not fit the data or the model."""
        if tuple(state["classes"]) != self.source.classes:
            raise ValueError(checkpoint.mismatch(state["classes"], self.source.classes))
        architecture.load_weights(self.trainer.model, state["model"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.trainer.scaler.load_state_dict(state["scaler"])
        if self.trainer.averaged is not None:
            self.trainer.averaged.load_state_dict(state["ema_state"])
        self.epoch, self.best_error, self._rows = state["epoch"], state["best_error"], state["log"]
        self.meter = self._new_meter(Sums(**state["sums"]), state["step"])
        if state["world"] != self.ranks.world and self.ranks.is_main:
            print(
                f"note: begun with {state['world']} processes, now {self.ranks.world}: other rounding", file=sys.stderr
            )

    def state(self, *, for_resuming: bool = True) -> dict[str, Any]:
        """Everything that a checkpoint holds; one that is not for resuming has no state of the optimizer's."""
        trainer, averaged = self.trainer, self.trainer.averaged
        state = {
            "format": checkpoint.FORMAT,
            "version": checkpoint.VERSION,
            "model": trainer.model.state_dict(),
            "ema": None if averaged is None else averaged.module.state_dict(),
            "arch": self.arch,
            "classes": list(self.source.classes),
            "preprocess": self.source.preprocess.to_dict(),
            "config": self.config.binding(),
            "epoch": self.epoch,
            "best_error": self.best_error,
            "step": self.meter.step,
            "sums": asdict(self.meter.sums),
            "log": self._rows if self.log is None else self.log.as_dicts(),
            "world": self.ranks.world,
            "torch": str(torch.__version__),
        }
        if for_resuming:
            state["optimizer"], state["scaler"] = trainer.optimizer.state_dict(), trainer.scaler.state_dict()
            state["ema_state"] = None if averaged is None else averaged.state_dict()
        return state

    def to_the_end(self) -> Outcome:
        """All epochs that are left."""
        config, main = self.config, self.ranks.is_main
        if main:
            self.files.remove_leftovers()
            self.log = Log(config.output, self._rows, tensorboard=config.tensorboard)
            with self.files.writing():
                self.log.write()
        self.progress = Progress(self.recipe.epochs, self.source.train_images, shown=main and not config.quiet)
        self.progress.say(self._headline())
        try:
            while self.epoch < self.recipe.epochs:
                self._one_epoch()
        finally:
            self.progress.end()
            if self.log is not None:
                self.log.close()
        assert self.best_error is not None
        self.progress.say(
            f"best validation error {self.best_error:.2f} %; best.pt, last.pt and log.csv are in {config.output}"
        )
        self.skipped.warn()
        return Outcome(config.output, self.epoch, self.best_error, self.skipped.lines)

    def _headline(self) -> str:
        model, source = self.trainer.model, self.source
        parameters = sum(parameter.numel() for parameter in model.parameters())
        position = f", from epoch {self.epoch + 1}, step {self.meter.step + 1}" if self.epoch or self.meter.step else ""
        many = f" × {self.ranks.world} processes" if self.ranks.world > 1 else ""
        return (
            f"{self.arch['name']}, {parameters:,} parameters, on {self.config.data}: {len(source.classes)} classes, "
            f"{source.train_images:,} training and {source.val_images:,} validation images; "
            f"{self.recipe.epochs} epochs of {self.steps:,} steps on {self.ranks.device.type}{many}{position}"
        )

    def _one_epoch(self) -> None:
        epoch, config = self.epoch + 1, self.config
        rate = self.recipe.learning_rate_in(epoch)
        self.trainer.set_learning_rate(rate)
        self.meter = self._new_meter(self.meter.sums, self.meter.step)
        self.progress.begin(epoch, self.meter.sums.images)
        try:
            sums = train_epoch(
                self.trainer, self._batches(epoch), self.meter,
                before=lambda step: seed_everything(config.seed, "step", epoch, step, self.ranks.rank),
                after=self._after_step,
            )  # fmt: skip
            self.progress.end()
            result = self._evaluate()
            if not math.isfinite(result.loss):
                raise FloatingPointError(f"the validation loss is {result.loss} after step {self.meter.step}")
            self._check_weights()
        except FloatingPointError as error:
            remains = self.files.what_remains()
            raise FloatingPointError(
                f"{error} of epoch {epoch}: training has diverged; {remains} (a smaller --learning-rate?)"
            ) from None
        row = Row(
            epoch, rate, sums.loss / sums.images, 100 * sums.wrong / sums.images, result.loss, result.error,
            sums.images / sums.seconds, sums.seconds,
        )  # fmt: skip
        better = self.best_error is None or result.error < self.best_error
        self.best_error = result.error if better else self.best_error
        self.epoch, self.meter = epoch, self._new_meter(Sums(), 0)
        if self.log is not None:
            with self.files.writing():
                self.log.add(row)
                if better:
                    checkpoint.save(self.state(for_resuming=False), self.files.best)
            self.files.save(self.state())
        assert self.best_error is not None
        self.progress.say(row.line(self.recipe.epochs, self.best_error))
        if self.epoch < self.recipe.epochs:
            self.skipped.report()

    def _new_meter(self, sums: Sums, step: int) -> Meter:
        return Meter(self.ranks, sums, step, lambda: self.interrupts.number)

    def _batches(self, epoch: int) -> Iterator[tuple[Iterator[Batch], int]]:
        """This rank's pieces of the epoch's remaining global batches."""
        order = epoch_order(self.source.train_images, self.config.seed, epoch)
        remaining = list(
            shares(
                order, self.recipe.batch_size, world=self.ranks.world, rank=self.ranks.rank,
                accumulate=self.config.accumulate, start=self.meter.step,
            )
        )  # fmt: skip
        loaded = self.source.train_batches(epoch, (piece for share in remaining for piece in share.pieces))
        for share in remaining:
            yield islice(loaded, len(share.pieces)), share.images

    def _after_step(self, meter: Meter) -> None:
        due = self.config.checkpoint_steps is not None and meter.step % self.config.checkpoint_steps == 0
        if due and not meter.is_read:
            meter.read()  # on all ranks: a checkpoint holds no step whose loss was not looked at
        if not meter.is_read:
            return
        self.progress.update(meter.sums.images, meter.sums.loss / meter.sums.images)
        if meter.stop:
            self._stop(meter.stop)
        if self.ranks.is_main and (due or self.files.minutes_since_save() > self.config.checkpoint_minutes):
            self._check_weights()
            self.files.save(self.state())
            meter.restart_clock()

    def _evaluate(self) -> Evaluation:
        ranks, averaged = self.ranks, self.trainer.averaged
        model = self.trainer.model if averaged is None else averaged.module
        ranks.share_buffers(model)
        pieces = evaluation_pieces(self.source.val_images, self.recipe.batch_size, world=ranks.world, rank=ranks.rank)

        def batches() -> Iterator[Batch]:
            for batch in self.source.val_batches(pieces):
                if self.interrupts.number:
                    self._stop(self.interrupts.number)
                yield batch

        return evaluate(model, batches(), ranks, self.trainer.autocast)

    def _stop(self, number: int) -> None:
        if self.ranks.is_main:
            self._check_weights()
            self.files.save(self.state())
        raise Stopped(number, f"in epoch {self.epoch + 1} after step {self.meter.step}; {self.files.what_remains()}")

    def _check_weights(self) -> None:
        """A finite loss may still have led to a step that is not."""
        if not all(value.isfinite().all() for value in self.trainer.model.state_dict().values()):
            raise FloatingPointError(f"weights are not finite after step {self.meter.step}")

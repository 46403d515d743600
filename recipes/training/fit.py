"""Training in memory, without checkpoints: enough for the demo and the ablation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from recipes.training.distributed import Ranks
from recipes.training.evaluation import evaluate
from recipes.training.loop import Meter, Sums, train_epoch
from recipes.training.recipe import Recipe
from recipes.training.source import Batch
from recipes.training.trainer import Trainer


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
        trainer.set_learning_rate(recipe.learning_rate_in(epoch))
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

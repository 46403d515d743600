"""Learning curves, and contact sheets of predictions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.ticker import MaxNLocator
from torch import Tensor

from recipes.figures.files import new_figure, save
from recipes.training.fit import History

if TYPE_CHECKING:
    from PIL.Image import Image

RIGHT, WRONG = "#0072b2", "#d55e00"  # Okabe and Ito: told apart by colour-blind readers too


class Prediction(NamedTuple):
    """An image's likeliest classes, best first, with their probabilities."""

    path: Path
    thumbnail: Image
    answers: list[tuple[str, float]]


def learning_curves(histories: dict[str, History], path: Path) -> None:
    """Training loss (nats) and test error (%) against epochs, a line for each network."""
    figure = new_figure(9, 3.6)
    loss, error = figure.subplots(1, 2)
    for (name, history), colour, style in zip(histories.items(), (RIGHT, WRONG), ("-", "--"), strict=False):
        epochs = range(1, len(history.train_loss) + 1)
        loss.plot(epochs, history.train_loss, style, color=colour, label=name)
        error.plot(epochs, [100 * (1 - a) for a in history.test_accuracy], style, color=colour, label=name)
    loss.set(xlabel="epoch", ylabel="training cross-entropy (nats)", yscale="log")
    error.set(xlabel="epoch", ylabel="test error (%)", yscale="log")
    for axes in (loss, error):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend()
    save(figure, path)


def contact_sheet(images: Tensor, labels: Tensor, probabilities: Tensor, path: Path, columns: int = 8) -> None:
    """Images [N, 1, H, W] with the predicted digit and its probability; a wrong one also names the truth."""
    rows = -(-len(images) // columns)
    figure = new_figure(1.25 * columns, 1.5 * rows)
    confidence, predicted = probabilities.max(1)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for i, axes in zip(range(len(images)), grid, strict=False):
        right = bool(predicted[i] == labels[i])
        axes.imshow(1 - images[i, 0], cmap="gray", vmin=0, vmax=1)
        title = f"{int(predicted[i])}  {100 * float(confidence[i]):.0f} %"
        axes.set_title(
            title if right else f"✗ {title}\nis {int(labels[i])}",
            fontsize=9,
            color=RIGHT if right else WRONG,
            fontweight="normal" if right else "bold",
        )
    save(figure, path)


def prediction_sheet(predictions: Sequence[Prediction], columns: int = 3) -> bytes:
    """A PNG: every image under its name, beside it its likeliest classes as bars of probability."""
    columns = min(columns, len(predictions))
    rows = -(-len(predictions) // columns)
    figure = new_figure(4.2 * columns, 1.75 * rows)
    grid = list(figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.6] * columns).flat)
    for axes in grid:
        axes.axis("off")
    for i, prediction in enumerate(predictions):
        image, bars = grid[2 * i], grid[2 * i + 1]
        grey = prediction.thumbnail.mode in ("1", "L", "I;16", "I", "F")
        image.imshow(prediction.thumbnail if grey else prediction.thumbnail.convert("RGB"), cmap="gray")
        image.set_title(shortened(prediction.path.name, 20), fontsize=8)
        bars.axis("on")
        bars.set(xlim=(0, 100), ylim=(4.5, -0.5), xticks=[], yticks=[])
        bars.spines[["top", "right", "bottom"]].set_visible(False)
        for place, (name, probability) in enumerate(prediction.answers):
            bars.barh(place, 100 * probability, color=RIGHT, alpha=0.45, height=0.85)
            bars.text(
                2, place, shortened(name, 18), va="center", fontsize=8, fontweight="bold" if place == 0 else "normal"
            )
            bars.text(99, place, f"{100 * probability:.1f} %", va="center", ha="right", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    return content.getvalue()


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - length + length // 2 + 1 :]}"

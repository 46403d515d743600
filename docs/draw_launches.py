"""Draws docs/launches.svg: `python docs/draw_launches.py` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

from drawing import FOLDER, INPUT, WINDOW, canvas, save
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

# (what the row is, tensors and launches by turns): a launch is a title and its steps
ROWS = (
    (
        "evaluation, group j",
        "activated\nchannels of\nthe window",
        ("1×1 convolution", "copy, multiply", "relu(BN(z)), store"),
        "z",
        ("3×3 convolution", "copy, multiply ×9", "add the shortcut", "relu(BN(y)), store"),
        "activated\nchannels of\ngroup j",
    ),
    (
        "training, group j",
        "activated,\nnewest raw",
        ("1×1 convolution", "activate the newest, store", "copy, multiply, store z", "Σ of tiles → BN of z"),
        "z",
        ("activate", "relu(BN(z)), store"),
        "z, active",
        ("3×3 convolution", "copy, multiply ×9", "add the shortcut, store y", "Σ of tiles → BN of y"),
        "raw\nchannels of\ngroup j",
    ),
    (
        "backward, group j",
        "dz of all\nlater groups\nthat read j",
        ("pull", "newest dz: a·g + b·z + c", "Σ over readers of W$_{1}$ᵀ·dz", "ReLU mask, store g",
         "Σg, Σg·x̂ → a, b, c"),
        "g",
        ("BN backward", "dy = a·g + b·y + c", "+ what shortcuts pass"),
        "dy",
        ("3×3, transposed", "copy, multiply ×9", "ReLU mask of z, store g", "Σg, Σg·x̂ → a, b, c"),
        "g of z",
    ),
)  # fmt: skip
TENSOR, LAUNCH, GAP, HEIGHT = 1.7, 3.4, 0.4, 1.7


def main(folder: Path = FOLDER) -> Path:
    """What the launches of a group do, in evaluation, in training and backward."""
    figure, (axes,) = canvas(13, 5.6)
    for row, (title, *parts) in enumerate(ROWS):
        x, y = 0.0, -row * (HEIGHT + 0.9)
        axes.text(0, y + HEIGHT + 0.15, title, ha="left", va="bottom", fontsize=11)
        for i, part in enumerate(parts):
            if isinstance(part, str):
                box(axes, x, y + 0.4, TENSOR, HEIGHT - 0.8, INPUT, part)
                width = TENSOR
            else:
                box(axes, x, y, LAUNCH, HEIGHT, WINDOW, "")
                axes.text(x + LAUNCH / 2, y + HEIGHT - 0.12, part[0], ha="center", va="top", fontsize=10, weight="bold")
                axes.text(x + LAUNCH / 2, y + HEIGHT - 0.48, "\n".join(part[1:]), ha="center", va="top", fontsize=9)
                width = LAUNCH
            x += width
            if i + 1 < len(parts):
                ends = (x + 0.04, y + HEIGHT / 2), (x + GAP - 0.04, y + HEIGHT / 2)
                axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=13, color="black"))
                x += GAP
    width = 4 * TENSOR + 3 * LAUNCH + 6 * GAP
    axes.text(width, HEIGHT + 0.15, "blue: one launch    grey: a tensor in memory", ha="right", va="bottom", fontsize=9)
    axes.set_xlim(-0.1, width + 0.1)
    axes.set_ylim(-2 * (HEIGHT + 0.9) - 0.1, HEIGHT + 0.6)
    return save(figure, folder / "launches.svg")


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


if __name__ == "__main__":
    main()

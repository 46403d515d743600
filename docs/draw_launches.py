"""Draws docs/launches.svg: `python docs/draw_launches.py` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

from drawing import FOLDER, INPUT, WINDOW, canvas, save
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

# (what the row is, tensors and launches by turns): a launch is a title and its steps
ROWS = (
    (
        "forward, group j",
        "buffer\nraw channels\nof the window",
        ("1×1 convolution", "load, relu(scale·v + shift)", "multiply, sum in float32", "store z raw",
         "Σ of every tile → BN of z"),
        "z, raw",
        ("3×3 convolution", "load, relu(scale·z + shift)", "multiply, sum in float32", "add the shortcut, store y raw",
         "Σ of every tile → BN of y"),
        "buffer\nchannels of\ngroup j",
    ),
    (
        "backward, group j",
        "dz of all\nlater groups\nthat read j",
        ("pull", "newest dz: a·g + b·z + c, on load", "Σ over readers of W$_{1}$ᵀ·dz",
         "ReLU mask, store g", "Σg and Σg·x̂ → a, b, c"),
        "g",
        ("3×3, transposed", "dy = a·g + b·y + c, on load", "W$_{3}$ᵀ ∗ dy, store dy", "ReLU mask of z, store g of z",
         "Σg and Σg·x̂ → a, b, c"),
        "g of z:\nbecomes dz in\nthe next pull",
    ),
)  # fmt: skip
TENSOR, LAUNCH, GAP, HEIGHT = 1.8, 4.0, 0.5, 1.7


def main(folder: Path = FOLDER) -> Path:
    """What the two launches of a group do, forward and backward."""
    figure, (axes,) = canvas(11, 4.6)
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
    width = 3 * TENSOR + 2 * LAUNCH + 4 * GAP
    axes.text(width, HEIGHT + 0.15, "blue: one launch    grey: a tensor in memory", ha="right", va="bottom", fontsize=9)
    axes.set_xlim(-0.1, width + 0.1)
    axes.set_ylim(-(HEIGHT + 0.9) - 0.1, HEIGHT + 0.6)
    return save(figure, folder / "launches.svg")


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


if __name__ == "__main__":
    main()

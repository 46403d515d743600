"""Draws docs/stage.svg from a real plan: `python docs/draw_stage.py` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

from drawing import FOLDER, INPUT, OLDER, SHORTCUT, TAIL, WINDOW, WRITTEN, canvas, cell, frame, legend, save
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch

from seqconv_triton import Plan
from seqconv_triton.plan import Tail

CHANNELS = 4
NAMES = ("layer A, block 1", "layer B, block 1", "layer A, block 2", "layer B, block 2", "extension")
SHOWN = (0, 5, 9, 14, 19)  # a group of every layer


def main(folder: Path = FOLDER) -> Path:
    """A stage of two blocks and a down-sampling block as one buffer, the windows of some of its groups below it."""
    figure, (axes,) = canvas(11, 4.6)
    plan = Plan.stage(CHANNELS, 1, 2, extension=CHANNELS, tail=Tail(2 * CHANNELS, 3, 2))
    total = plan.total_channels
    for c in range(total):
        cell(axes, c, 0, INPUT if c < CHANNELS else OLDER)
        label = f"x$_{c}$" if c < CHANNELS else f"y$_{{{c - CHANNELS}}}$"
        axes.text(c + 0.5, 0.41, label, ha="center", va="center", fontsize=9)
    bracket(axes, 0, CHANNELS, 1.0, "input of the stage")
    start = CHANNELS
    for layer, name in zip(plan.layers, NAMES, strict=True):
        bracket(axes, start, start + layer.out_channels, 1.0, name)
        start += layer.out_channels
    for row, j in enumerate(SHOWN):
        group, y = plan.groups[j], -1.5 - row
        for c in range(group.window_start, group.window_start + group.window_width):
            cell(axes, c, y, WINDOW)
        cell(axes, plan.slot(j), y, WRITTEN)
        if group.residual_start is not None:
            frame(axes, group.residual_start, y)
            axes.add_patch(
                FancyArrowPatch(
                    (group.residual_start + 0.5, y + 0.05), (plan.slot(j) + 0.5, y + 0.05), color=SHORTCUT,
                    connectionstyle="arc3,rad=0.12", arrowstyle="-|>", mutation_scale=11, linewidth=1.3,
                )
            )  # fmt: skip
        axes.text(-0.3, y + 0.41, f"group {j}", ha="right", va="center", fontsize=9)
    y = -1.7 - len(SHOWN)
    for c in range(total - plan.read_channels, total):
        cell(axes, c, y, TAIL)
    axes.text(-0.3, y + 0.41, "downsizing conv", ha="right", va="center", fontsize=9)
    entries = {
        "the window a group reads": WINDOW, "the k channels it appends": WRITTEN, "raw shortcut it adds": SHORTCUT,
        "what the downsizing conv reads": TAIL,
    }  # fmt: skip
    legend(axes, entries, ("raw shortcut it adds",), loc="lower left", bbox_to_anchor=(0.05, -0.12), ncols=4)
    axes.set_xlim(-3.4, total + 0.2)
    axes.set_ylim(y - 0.3, 2.2)
    return save(figure, folder / "stage.svg")


def bracket(axes: Axes, start: int, stop: int, y: float, text: str) -> None:
    """A line over channels [start, stop), with a text above it."""
    axes.plot([start + 0.1, stop - 0.1], [y, y], color="black", linewidth=1)
    axes.text((start + stop) / 2, y + 0.15, text, ha="center", va="bottom", fontsize=9)


if __name__ == "__main__":
    main()

"""Draws docs/window.svg from a real plan: `python docs/draw_window.py` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

from drawing import FOLDER, INPUT, OLDER, SHORTCUT, WINDOW, WRITTEN, canvas, cell, frame, legend, save

from seqconv_triton import Plan


def main(folder: Path = FOLDER) -> Path:
    """One block of a windowed stage, C = 4 groups: a row for every group, a column for every k channels."""
    figure, (axes,) = canvas(9, 3.7)
    plan = Plan.stage(4, 1, 1)
    for j, group in enumerate(plan.groups):
        y = -j
        for c in range(plan.slot(j) + 1):
            inside = group.window_start <= c < group.window_start + group.window_width
            colour = WRITTEN if c == plan.slot(j) else WINDOW if inside else INPUT if c < plan.in_channels else OLDER
            cell(axes, c, y, colour)
        if group.residual_start is not None:
            frame(axes, group.residual_start, y)
        layer = "A" if j < 4 else "B"
        axes.text(-0.25, y + 0.41, f"layer {layer}, group {j % 4}", ha="right", va="center", fontsize=9)
    for c in range(plan.total_channels):
        label = f"x$_{c}$" if c < plan.in_channels else f"y$_{c - plan.in_channels}$"
        axes.text(c + 0.5, 1.05, label, ha="center", va="bottom", fontsize=10)
    added = "raw shortcut it adds"
    entries = {
        "the window it reads": WINDOW, "the block's input x": INPUT, "the k channels it writes": WRITTEN,
        "what groups wrote before, y": OLDER, added: SHORTCUT,
    }  # fmt: skip
    legend(axes, entries, (added,), loc="lower left", bbox_to_anchor=(0.0, -0.26), ncols=3)
    axes.set_xlim(-2.6, plan.total_channels + 0.1)
    axes.set_ylim(-len(plan.groups) + 0.9, 1.7)
    return save(figure, folder / "window.svg")


if __name__ == "__main__":
    main()

"""Draws docs/aggregation.svg from real plans: `python docs/draw_aggregation.py` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

from drawing import FOLDER, INPUT, OLDER, WINDOW, WRITTEN, canvas, cell, legend, save

from seqconv_triton import Plan

CHANNELS, GROUPS = 4, 8


def main(folder: Path = FOLDER) -> Path:
    """Dense beside windowed aggregation: a row for every group of one layer, a column for every k channels."""
    figure, panels = canvas(10.5, 3.6, panels=2)
    titles = {False: "dense: all that is there", True: "windowed: the newest C channels"}
    for axes, (windowed, title) in zip(panels, titles.items(), strict=True):
        plan = Plan.layer(CHANNELS, GROUPS, 1, windowed=windowed)
        for j, group in enumerate(plan.groups):
            for c in range(plan.slot(j) + 1):
                inside = group.window_start <= c < group.window_start + group.window_width
                cell(
                    axes, c, -j,
                    WRITTEN if c == plan.slot(j) else WINDOW if inside else INPUT if c < CHANNELS else OLDER,
                )  # fmt: skip
            axes.text(-0.25, -j + 0.41, f"group {j}", ha="right", va="center", fontsize=9)
            axes.text(
                plan.total_channels + 0.9, -j + 0.41, str(group.window_width), ha="center", va="center", fontsize=9
            )  # fmt: skip
        axes.text(plan.total_channels + 0.9, 1.05, "reads", ha="center", va="bottom", fontsize=9)
        for c in range(plan.total_channels):
            label = f"x$_{c}$" if c < CHANNELS else f"y$_{c - CHANNELS}$"
            axes.text(c + 0.5, 1.05, label, ha="center", va="bottom", fontsize=10)
        axes.set_title(title, fontsize=11)
        axes.set_xlim(-1.9, plan.total_channels + 1.6)
        axes.set_ylim(-GROUPS + 0.9, 1.7)
    legend(
        panels[0], {"the channels it reads": WINDOW, "the k channels it writes": WRITTEN}, loc="lower left",
        bbox_to_anchor=(0.0, -0.2), ncols=2,
    )  # fmt: skip
    return save(figure, folder / "aggregation.svg")


if __name__ == "__main__":
    main()

"""Draws docs/pull.svg from a real plan: `python docs/draw_pull.py` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

from drawing import FOLDER, INPUT, OLDER, WINDOW, WRITTEN, canvas, cell, legend, save

from seqconv_triton import Plan

CHANNELS, GROUPS, READER, PULLED = 4, 9, 5, 3


def main(folder: Path = FOLDER) -> Path:
    """The connections of a layer twice: forward takes a row of them, backward a column."""
    figure, panels = canvas(10.5, 3.9, panels=2)
    plan = Plan.layer(CHANNELS, GROUPS, 1)
    column = plan.slot(PULLED)
    first, last = plan.readers[PULLED + 1]
    titles = (f"forward: group {READER} gathers its window", f"backward: y$_{PULLED}$ gathers from its readers")
    for axes, forward, title in zip(panels, (True, False), titles, strict=True):
        for j, group in enumerate(plan.groups):
            for c in range(plan.total_channels - 1):
                inside = group.window_start <= c < group.window_start + group.window_width
                chosen = j == READER if forward else c == column and first <= j < last
                if inside:
                    cell(axes, c, -j, WINDOW if chosen else INPUT)
                else:
                    cell(axes, c, -j, OLDER, width=0.98)
            axes.text(-0.25, -j + 0.41, f"group {j}", ha="right", va="center", fontsize=9)
        for c in range(plan.total_channels - 1):
            label = f"x$_{c}$" if c < CHANNELS else f"y$_{c - CHANNELS}$"
            axes.text(c + 0.5, 1.05, label, ha="center", va="bottom", fontsize=10)
        if forward:
            cell(axes, plan.slot(READER), -READER, WRITTEN)
        else:
            cell(axes, column, -PULLED, WRITTEN)
        axes.set_title(title, fontsize=11)
        axes.set_xlim(-1.9, plan.total_channels - 0.7)
        axes.set_ylim(-GROUPS + 0.9, 1.7)
    connected = {"a connection: one k×k block of weights": INPUT, "those of this launch": WINDOW}
    legend(panels[0], connected | {"written once": WRITTEN}, loc="lower left", bbox_to_anchor=(0.0, -0.18), ncols=3)
    return save(figure, folder / "pull.svg")


if __name__ == "__main__":
    main()

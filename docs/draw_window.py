"""Draws docs/window.svg from a real plan: `python docs/draw_window.py` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from seqconv_triton import Plan

INPUT, WINDOW, WRITTEN, OLDER, SHORTCUT = "#dddddd", "#56b4e9", "#e69f00", "#f2f2f2", "#009e73"  # Okabe and Ito


def main() -> None:
    """One block of a windowed stage, C = 4 groups: a row for every group, a column for every k channels."""
    plt.switch_backend("svg")
    plt.rcParams["svg.hashsalt"] = "seqconv"  # the same file every time
    plan = Plan.stage(4, 1, 1)
    figure, axes = plt.subplots(figsize=(9, 3.7))
    for j, group in enumerate(plan.groups):
        y = -j
        for c in range(plan.slot(j) + 1):
            inside = group.window_start <= c < group.window_start + group.window_width
            colour = WRITTEN if c == plan.slot(j) else WINDOW if inside else INPUT if c < plan.in_channels else OLDER
            axes.add_patch(Rectangle((c, y), 1, 0.82, facecolor=colour, edgecolor="white", linewidth=1.5))
        if group.residual_start is not None:
            axes.add_patch(
                Rectangle(
                    (group.residual_start + 0.06, y + 0.05), 0.88, 0.72, fill=False, edgecolor=SHORTCUT, linewidth=2
                )
            )
        layer = "layer A" if j < 4 else "layer B"
        axes.text(-0.25, y + 0.41, f"group {j} ({layer})", ha="right", va="center", fontsize=9)
    for c in range(plan.total_channels):
        label = f"x$_{c}$" if c < plan.in_channels else f"y$_{c - plan.in_channels}$"
        axes.text(c + 0.5, 1.05, label, ha="center", va="bottom", fontsize=10)
    legend = [
        Rectangle((0, 0), 1, 1, facecolor=WINDOW, label="the window it reads"),
        Rectangle((0, 0), 1, 1, facecolor=WRITTEN, label="the k channels it writes"),
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=SHORTCUT, linewidth=2, label="raw shortcut it adds"),
    ]
    axes.legend(handles=legend, loc="lower left", bbox_to_anchor=(0.0, -0.16), ncols=3, frameon=False, fontsize=9)
    axes.set_xlim(-2.6, plan.total_channels + 0.1)
    axes.set_ylim(-len(plan.groups) + 0.9, 1.7)
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("window.svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()

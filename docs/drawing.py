"""What the pictures of these pages share: Okabe and Ito's colours, cells, and files that are the same every time."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).parent
INPUT, OLDER = "#dddddd", "#f2f2f2"
WINDOW, WRITTEN, SHORTCUT, TAIL = "#56b4e9", "#e69f00", "#009e73", "#cc79a7"
PALETTE = (INPUT, OLDER, WINDOW, WRITTEN, SHORTCUT, TAIL)


def canvas(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `width` × `height` inches, its axes without ticks and frame."""
    plt.switch_backend("svg")
    plt.rcParams["svg.hashsalt"] = "seqconv"  # the same file every time
    figure, grid = plt.subplots(1, panels, figsize=(width, height), squeeze=False)
    for axes in grid[0]:
        axes.axis("off")
    return figure, list(grid[0])


def cell(axes: Axes, x: float, y: float, colour: str, width: float = 1, height: float = 0.82) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1.5))


def frame(axes: Axes, x: float, y: float, width: float = 1, height: float = 0.82, colour: str = SHORTCUT) -> None:
    """An outline just inside a cell."""
    axes.add_patch(
        Rectangle((x + 0.06, y + 0.05), width - 0.12, height - 0.1, fill=False, edgecolor=colour, linewidth=2)
    )


def legend(axes: Axes, entries: dict[str, str], outlined: tuple[str, ...] = (), **place: object) -> None:
    """`entries` maps a text to its colour; those in `outlined` show as frames."""
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour, linewidth=2, label=text)
        if text in outlined
        else Rectangle((0, 0), 1, 1, facecolor=colour, label=text)
        for text, colour in entries.items()
    ]
    axes.legend(handles=handles, frameon=False, fontsize=9, **place)


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return path

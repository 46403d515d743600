"""Figures without a display, and their files: checked before any work, written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from recipes import files
from seqconv_triton.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
DOTS_PER_INCH = 150


def check_output(path: Path) -> None:
    """Raises ValueError unless the name says a format that is written here, and names no folder."""
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise ValueError(f"output ({path}) must end in {', '.join(f'.{name}' for name in FORMATS)}")
    if path.is_dir():
        raise ValueError(f"output ({path}) is a folder; name a file")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches. Raises ImportError, naming the extra, where matplotlib is missing."""
    require("the picture", "plot", "matplotlib.figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """The same bytes for the same figure; a failure leaves an older file as it was."""
    import matplotlib

    check_output(path)
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    kind = path.suffix.lower().removeprefix(".")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "seqconv"}):
        figure.savefig(buffer, format=kind, dpi=DOTS_PER_INCH, metadata=undated[kind])
    files.write(path, buffer.getbuffer())

"""`python -m recipes.history`: training and validation error against epochs, as in the paper's Figure 4."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recipes import commands
from recipes.figures.files import check_output, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG = "log.csv"
SETS: dict[str, tuple[str, Literal["-", "--"]]] = {
    "val_error": ("validation", "-"),
    "train_error": ("training", "--"),
}
# Okabe and Ito, without the yellow that is lost on white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


@dataclass
class Curve:
    """Errors in per cent after each epoch; not-a-number where one was not measured. `ignored` lists unusable lines."""

    name: str
    epochs: list[int] = field(default_factory=list)
    train_error: list[float] = field(default_factory=list)
    val_error: list[float] = field(default_factory=list)
    ignored: list[int] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"folders that hold {LOG}, or such files")
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="instead of the folders' names, one a run")
    parser.add_argument("--log", action="store_true", help="logarithmic error axis")
    parser.add_argument("--max-error", type=float, metavar="PERCENT", help="upper end of the error axis")
    parser.add_argument("--output", type=Path, default=Path("out/history.png"), help="default: out/history.png")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Exit status 0; ValueError for logs that are none, FileNotFoundError where there is none."""
    check_output(arguments.output)
    if len(arguments.runs) > len(COLOURS):
        raise ValueError(f"runs ({len(arguments.runs)}) must be at most {len(COLOURS)}: more colours look alike")
    limit = arguments.max_error
    if limit is not None and not 0 < limit <= 100:
        raise ValueError(f"max_error ({limit}) must be above 0 and at most 100")
    names = arguments.labels or run_names(arguments.runs)
    if len(names) != len(arguments.runs):
        raise ValueError(f"labels ({len(names)}) must be as many as runs ({len(arguments.runs)})")
    curves = [read_log(path, name) for path, name in zip(arguments.runs, names, strict=True)]
    for path, curve in zip(arguments.runs, curves, strict=True):
        if curve.ignored:
            lines = ", ".join(map(str, curve.ignored[:5])) + (", …" if len(curve.ignored) > 5 else "")
            print(f"{path}: {len(curve.ignored)} incomplete line(s) ignored: {lines}", file=sys.stderr)
    save(draw(curves, log=arguments.log, max_error=limit), arguments.output)
    print(f"{len(curves)} run{'s' if len(curves) > 1 else ''} in {arguments.output}")
    return 0


def run_names(runs: list[Path]) -> list[str]:
    """The folders' names; as much of the paths as keeps them apart where two are the same."""
    folders = [(run.parent if run.suffix == ".csv" else run).resolve() for run in runs]
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


def read_log(path: Path, name: str) -> Curve:
    """The log of a run, a folder or the file itself. Of an epoch logged twice, as after resuming, the last counts.

    Lines that a crash has cut off, or that hold no numbers, are left out and listed in `ignored`. Raises
    FileNotFoundError where there is no log, ValueError where it is no log, or has no epoch in it.
    """
    file = path / LOG if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {LOG}" if path.is_dir() else f"{path} does not exist")
    needed = ("epoch", *SETS)
    rows: dict[int, tuple[float, float]] = {}
    ignored = []
    with file.open(encoding="utf-8", errors="replace", newline="") as opened:
        reader = csv.reader(opened)
        try:
            header = next(reader, [])
            missing = [column for column in needed if column not in header]
            if not header:
                raise ValueError(f"{file} is empty")
            if missing:
                raise ValueError(f"{file} is no training log: it has no column {', '.join(missing)}")
            places = [header.index(column) for column in needed]
            for row in reader:
                values = _values(row, places, len(header))
                if values is None:
                    ignored.append(reader.line_num)
                else:
                    rows[values[0]] = values[1:]
        except csv.Error as error:
            raise ValueError(f"{file} is no training log: {error}") from error
    if not rows:
        raise ValueError(f"{file} has no finished epoch yet")
    epochs = sorted(rows)
    return Curve(name, epochs, [rows[epoch][1] for epoch in epochs], [rows[epoch][0] for epoch in epochs], ignored)


def _values(row: list[str], places: list[int], columns: int) -> tuple[int, float, float] | None:
    """(epoch, val_error, train_error), or None for a row that is not whole; an empty error was not measured."""
    if len(row) != columns:
        return None
    epoch, *errors = (row[place].strip() for place in places)
    try:
        number = int(epoch)
        validation, training = (float(text) if text else math.nan for text in errors)
    except ValueError:
        return None
    sound = number >= 1 and all(math.isnan(value) or 0 <= value <= 100 for value in (validation, training))
    return (number, validation, training) if sound else None


def draw(curves: list[Curve], *, log: bool = False, max_error: float | None = None) -> Figure:
    """A colour for each run, solid for validation, dashed for training; on a logarithmic axis zeros have no place."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    handles = []
    for curve, colour in zip(curves, COLOURS, strict=False):
        for column, (_, style) in SETS.items():
            marker = "." if len(curve.epochs) == 1 else ""
            axes.plot(curve.epochs, getattr(curve, column), style, marker=marker, color=colour, linewidth=1.4)
        measured = [error for error in curve.val_error if not math.isnan(error)]
        figures = f" (last {measured[-1]:.2f} %, best {min(measured):.2f} %)" if measured else ""
        handles.append(Line2D([], [], color=colour, label=f"{curve.name}{figures}"))
    for label, style in SETS.values():
        handles.append(Line2D([], [], color="#555555", linestyle=style, label=label))
    axes.set(xlabel="epoch", ylabel="error (%)")
    if log:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    if max_error is not None:
        axes.set_ylim(top=max_error)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(handles=handles, fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> int:
    """`python -m recipes.history`."""
    return commands.run("history", add_arguments, run_from_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())

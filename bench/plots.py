"""`python -m bench plot`: pictures of a results file. Every picture leaves out what was not measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import plot_kernels
from bench.peers import PUBLISHED
from bench.results import Row, load, timed

# Okabe and Ito's colours and shapes, told apart by colour-blind readers and in print; one of each for a contender.
LOOKS = {
    "ours": ("#0072b2", "o"),
    "reference": ("#d55e00", "s"),
    "resnet50": ("#009e73", "^"),
    "resnet101": ("#56b4e9", "v"),
    "resnet152": ("#cc79a7", "D"),
    "resnext50_32x4d": ("#e69f00", "P"),
    "densenet169": ("#000000", "X"),
}
STYLES: dict[str, Any] = {"eager": ":", "compiled": "-", "max-autotune": "--", "fused": (0, (5, 1)), "graph": "-."}
Rows = list[Row]


def look(contender: str) -> dict[str, Any]:
    who, how = contender.split()
    colour, marker = LOOKS[who]
    return {"color": colour, "marker": marker, "linestyle": STYLES[how], "label": contender}


def named(row: Row) -> str:
    """The contender, a peer with its package's version."""
    return f"{row['contender']} ({row['version']})" if "version" in row else str(row["contender"])


def whole(rows: Rows, part: str) -> Rows:
    """Rows of whole models."""
    return [row for row in rows if row["part"] == part and row["subject"] in PUBLISHED]


def significant(value: float) -> str:
    """Three significant digits, without powers of ten."""
    return f"{float(f'{value:.3g}'):,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def throughput(rows: Rows, figure: Any) -> bool:
    """Images a second of every contender: a panel for every model, evaluation above, training below."""
    groups: dict[tuple[str, str], Rows] = {}
    for part in ("eval", "step"):
        for row in whole(rows, part):
            groups.setdefault((part, row["subject"]), []).append(row)
    if not groups:
        return False
    subjects = sorted({subject for _, subject in groups})
    parts = [part for part in ("eval", "step") if any(part == p for p, _ in groups)]
    figure.set_size_inches(max(7.0, 5.4 * len(subjects)), 3.2 * len(parts))
    grid = figure.subplots(len(parts), len(subjects), squeeze=False)
    for i, part in enumerate(parts):
        for j, subject in enumerate(subjects):
            axes, found = grid[i][j], groups.get((part, subject), [])
            if not found:
                axes.axis("off")
                continue
            batch = max(row["batch"] for row in found)
            found = sorted((row for row in found if row["batch"] == batch), key=lambda row: -row["median"])
            rates = [batch / row["median"] for row in found]
            spread = [[rate - batch / row["upper"] for rate, row in zip(rates, found, strict=True)],
                      [batch / row["lower"] - rate for rate, row in zip(rates, found, strict=True)]]  # fmt: skip
            colours = [LOOKS[row["contender"].split()[0]][0] for row in found]
            axes.barh([named(row) for row in found], rates, xerr=spread, color=colours, capsize=3)
            for place, (rate, row) in enumerate(zip(rates, found, strict=True)):
                end = (batch / row["lower"], place)
                axes.annotate(significant(rate), end, xytext=(5, 0), textcoords="offset points", va="center", size=8)
            axes.set_xlim(0, 1.2 * max(rates))
            axes.tick_params(labelsize=8)
            what = "evaluation" if part == "eval" else "training step"
            axes.set(title=f"{subject}, {what}, batch {batch}", xlabel="images per second (bars: quartiles)")
    return True


def against_batch(value: Callable[[Row], float | None], ylabel: str) -> Callable[[Rows, Any], bool]:
    """A panel for every model and part that ran with several batches: a value against them, a line a contender."""

    def draw(rows: Rows, figure: Any) -> bool:
        panels: dict[tuple[str, str], Rows] = {}
        for part in ("eval", "step"):
            for row in whole(rows, part):
                if value(row) is not None:
                    panels.setdefault((row["subject"], part), []).append(row)
        panels = {key: found for key, found in panels.items() if len({row["batch"] for row in found}) > 1}
        if not panels:
            return False
        figure.set_size_inches(2 + 4.2 * min(3, len(panels)), 3.6 * -(-len(panels) // 3))
        grid = figure.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False).flat
        for ((subject, part), found), axes in zip(panels.items(), grid, strict=False):
            for contender in sorted({row["contender"] for row in found}):
                own = sorted((row for row in found if row["contender"] == contender), key=lambda row: row["batch"])
                axes.plot([row["batch"] for row in own], [value(row) for row in own], **look(contender))
            ticks = sorted({row["batch"] for row in found})
            axes.set(xscale="log", yscale="log", xlabel="batch (images)", ylabel=ylabel)
            axes.set_title(f"{subject}, {'evaluation' if part == 'eval' else 'training step'}")
            axes.set_xticks(ticks, labels=map(str, ticks))
            axes.minorticks_off()
            plot_kernels.plain_ticks(axes.yaxis)
            axes.margins(x=0.2)
        for axes in list(grid):
            axes.axis("off")
        known = {line.get_label(): line for axes in figure.axes for line in axes.lines}
        figure.legend(known.values(), known, loc="outside right upper", fontsize=8)
        return True

    return draw


def error_against_time(rows: Rows, figure: Any) -> bool:
    """Published top-1 error against the time of one image, evaluation, at the batch that most networks ran."""
    by_batch: dict[int, dict[tuple[str, str], Row]] = {}
    for row in whole(rows, "eval"):
        who = row["contender"].split()[0]
        network = row["subject"] if who in ("ours", "reference") else who
        fastest = by_batch.setdefault(row["batch"], {})
        best = fastest.setdefault((network, who), row)
        if row["median"] < best["median"]:
            fastest[network, who] = row
    if not by_batch:
        return False
    batch = max(by_batch, key=lambda size: (len(by_batch[size]), size))  # the one with most networks
    figure.set_size_inches(9, 4.2)
    axes = figure.subplots()
    shapes = dict(zip(PUBLISHED, "o^sv<>DP", strict=True))  # a network's shape; the colour says who computes it
    for (network, who), row in sorted(by_batch[batch].items(), key=lambda item: item[1]["median"]):
        x, y = 1e3 * row["median"] / batch, PUBLISHED[network].error
        text = f"{network}, {row['contender']}" if who in ("ours", "reference") else f"{row['contender']}"
        axes.plot([x], [y], color=LOOKS[who][0], marker=shapes[network], markersize=9, linestyle="", label=text)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="fastest first", title_fontsize=8)
    axes.set(xscale="log", xlabel=f"ms per image, evaluation, batch {batch} (each network's fastest form)")
    plot_kernels.plain_ticks(axes.xaxis)
    axes.set(ylabel="published ImageNet top-1 error (%)", title="Error against time: lower left is better")
    axes.margins(0.15)
    return True


def mebibytes(field: str) -> Callable[[Row], float | None]:
    return lambda row: row[field] / 2**20 if field in row else None


PICTURES: dict[str, Callable[[Rows, Any], bool]] = {
    "throughput": throughput,
    "latency": against_batch(lambda row: 1e3 * row["median"], "ms per pass (median)"),
    "memory": against_batch(mebibytes("peak_bytes"), "peak memory (MiB)"),
    "error": error_against_time,
    "growth": plot_kernels.growth,
}


def draw(contents: dict[str, Any], folder: Path, suffix: str = "png") -> list[Path]:
    """Write the pictures that the results have rows for into a folder; their paths. Needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install seqconv_triton[bench]") from error
    rows = list(timed(contents["rows"]).values())
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in PICTURES.items() | {("roofline", plot_kernels.roofline(contents))}:
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if not picture(rows, figure):
            continue
        source = contents["provenance"]
        where = source.get("gpu") or f"{source.get('processor')}, {source.get('threads')} threads"
        caption = f"{where}, torch {source.get('torch')}, {source.get('date')}, revision {source.get('revision')}"
        figure.supxlabel(caption, fontsize=7, color="0.4")
        for axes in figure.axes:
            axes.grid(visible=True, alpha=0.25)
            axes.set_axisbelow(True)
        path = folder / f"{name}.{suffix}"
        figure.savefig(path, dpi=110)
        paths.append(path)
    return sorted(paths)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("--folder", type=Path, help="where to (default: a folder with the file's name beside it)")
    parser.add_argument("--format", choices=("png", "svg"), default="png")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    folder = arguments.folder or arguments.results.with_suffix("")
    for path in draw(load(arguments.results), folder, arguments.format):
        print(path)
    return 0

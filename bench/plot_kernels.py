"""Two pictures: measured speed against the roofline, and time against the number of groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bench.results import Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442", "#999999")
MARKERS = "os^vDPX*<"
OURS, REFERENCE = ("#0072b2", "o"), ("#d55e00", "s")


def plain_ticks(axis: Any) -> None:
    """Numbers instead of powers of ten on a logarithmic axis, at 1, 2 and 5; more where those would be few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 6 * low else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def kind_of(row: Row) -> str:
    """What shares a marker: a kernel's family, or the stages, layers and networks."""
    subject = row["subject"]
    if subject.startswith("kernel "):
        return str(subject.removeprefix("kernel ").split(", ")[0])
    if " stage " in subject:
        return f"stage, {row['part']}"
    return "layer" if subject.startswith(("layer", "depth", "width", "dense")) else f"network, {row['part']}"


def roofline(contents: dict[str, Any]) -> Callable[[list[Row], Any], bool]:
    """Operations a second against operations a byte, below the roof that this device's measured ceilings make."""

    def draw(rows: list[Row], figure: Any) -> bool:
        ceilings = contents.get("ceilings")
        wanted = [row for row in rows if row.get("operations") and row["part"] != "step"]
        if any(row["subject"].startswith("kernel ") for row in wanted):
            wanted = [row for row in wanted if row["subject"].startswith("kernel ")]
        else:
            wanted = [row for row in wanted if not row["subject"].startswith(("depth", "width", "dense"))]
        if not wanted or not ceilings:
            return False
        figure.set_size_inches(8.4, 4.8)
        axes = figure.subplots()
        unit, name = (1e12, "10¹²") if ceilings["operations_per_second"] > 1e13 else (1e9, "10⁹")
        bandwidth, peak = ceilings["bytes_per_second"], ceilings["operations_per_second"]
        intensity = [row["operations"] / row["moved_bytes"] for row in wanted]
        low, high = min([*intensity, peak / bandwidth]) / 2, max([*intensity, peak / bandwidth]) * 2
        ends = [low, peak / bandwidth, high]
        axes.plot(ends, [min(peak, bandwidth * x) / unit for x in ends], color="0.3", label="measured ceilings")
        kinds = sorted({kind_of(row) for row in wanted})
        for number, kind in enumerate(kinds):
            own = [row for row in wanted if kind_of(row) == kind]
            axes.plot(
                [row["operations"] / row["moved_bytes"] for row in own],
                [row["operations"] / row["median"] / unit for row in own],
                linestyle="", marker=MARKERS[number % 9], color=COLOURS[number % 9], label=kind, alpha=0.85,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", title="Ours against the roofline")
        axes.set(xlabel="operations per byte, every operand once a launch", ylabel=f"operations per second ({name})")
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return True

    return draw


def slope(points: list[tuple[float, float]]) -> float:
    """Exponent p of time ∝ groups^p, by least squares on logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def growth_points(rows: list[Row], kind: str, who: str) -> list[tuple[float, float]]:
    """(blocks or groups, ms) of "depth", "width" or "dense width"."""
    found = [
        (float(row["subject"].rpartition(" ")[2]), 1e3 * row["median"])
        for row in rows
        if row["subject"].rpartition(" ")[0] == kind and row["contender"] == f"{who} eager"
    ]
    return sorted(found)


def growth(rows: list[Row], figure: Any) -> bool:
    """Time against depth and width, with the exponent of growth in the legend: 1 is linear."""
    panels = {
        "depth": ("residual blocks of a stage (C 128, k 32, 28²)", "Depth"),
        "width": ("groups of a layer (window 256, k 64, 14²)", "Width, windowed"),
        "dense width": ("groups of a layer (everything seen, k 64, 14²)", "Width, dense (windowed=False)"),
    }
    if not any(len(growth_points(rows, kind, "ours")) > 1 for kind in panels):
        return False
    figure.set_size_inches(13, 3.8)
    for axes, (kind, (xlabel, title)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for who, (colour, marker) in (("ours", OURS), ("reference", REFERENCE)):
            points = growth_points(rows, kind, who)
            if len(points) < 2:
                continue
            xs, ys = zip(*points, strict=True)
            label = f"{who}, time ∝ n^{slope(points[-3:]):.2f} (last three)"
            axes.plot(xs, ys, color=colour, marker=marker, label=label)
        axes.set(xlabel=xlabel, ylabel="ms (median, evaluation)", title=title, xlim=(0, None), ylim=(0, None))
        if axes.lines:
            axes.legend(fontsize=8)
    return True

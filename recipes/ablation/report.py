"""The ablation's table: mean and spread over seeds, differences paired by seed, and the paper's figures beside them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from recipes.ablation.runs import Result
from recipes.ablation.settings import CONTESTANTS, Contestant, Setting

DIFFERENCE = "difference to the first row, 95 % interval"


@dataclass(frozen=True)
class Row:
    """Errors in per cent, one a seed; `difference` and `half_width` are those to the table's first row, in points.

    The true mean difference lies within ± half_width with 95 % confidence (Student's t over the pairs of one seed).
    """

    contestant: Contestant
    parameters: int
    errors: list[float]
    difference: float | None
    half_width: float | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.errors)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None

    @property
    def told_apart(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.difference is not None and self.half_width is not None and abs(self.difference) > self.half_width


def rows(results: list[Result]) -> list[Row]:
    """A row for every network, in the order of CONTESTANTS; a difference needs at least two seeds in common."""
    of: dict[str, dict[int, Result]] = {}
    for result in results:
        of.setdefault(result.key, {})[result.seed] = result
    keys = [key for key in CONTESTANTS if key in of]
    table = []
    for key in keys:
        runs, first = of[key], of[keys[0]]
        pairs = [runs[seed].error - first[seed].error for seed in runs if seed in first] if key != keys[0] else []
        enough = len(pairs) > 1
        table.append(
            Row(
                CONTESTANTS[key],
                next(iter(runs.values())).parameters,
                [runs[seed].error for seed in sorted(runs)],
                statistics.mean(pairs) if enough else None,
                half_width(pairs) if enough else None,
            )
        )
    return table


def half_width(values: list[float]) -> float:
    """Half of the 95 % confidence interval of the mean, by Student's t."""
    from scipy.stats import t  # type: ignore[import-untyped,unused-ignore]

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def markdown(results: list[Result], setting: Setting, provenance: dict[str, str]) -> str:
    """The table with its explanation, as a page of its own."""
    table = rows(results)
    one = results[0]
    seeds = sorted({result.seed for result in results})
    lines = [
        f"# Ablation on {setting.data}",
        "",
        f"Test error in per cent after {setting.epochs} epochs, mean ± standard deviation over {len(seeds)} seeds; "
        f"{one.train_images:,} training and {one.test_images:,} test images{_split(setting)}. "
        f"{_sizes(setting)}",
        "",
        f"| network | parameters | test error % | {DIFFERENCE} | paper, CIFAR-10+ error % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in table:
        spread = "" if row.spread is None else f" ± {row.spread:.2f}"
        difference = "" if row.difference is None else f"{row.difference:+.2f} ± {row.half_width:.2f}"
        lines.append(
            f"| {row.contestant.name} | {row.parameters:,} | {row.mean:.2f}{spread} | {difference} "
            f"| {row.contestant.paper} |"
        )
    lines += ["", *_reading(table, setting, len(seeds)), "", _provenance(provenance), ""]
    return "\n".join(lines)


def _split(setting: Setting) -> str:
    return ", split anew for every seed and the same for all networks; no dropout" if setting.data == "digits" else ""


def _sizes(setting: Setting) -> str:
    if setting.stem_channels == 16:
        return "The SeqResNets have the paper's sizes; the other networks are sized to the first row's parameters."
    return (
        f"All widths and group widths k of the SeqResNets are {setting.stem_channels}/16 of those named (the paper's), "
        "so that every layer has the paper's number of groups; the other networks are sized to the first row's "
        "parameters."
    )


def _reading(table: list[Row], setting: Setting, seeds: int) -> list[str]:
    if len(table) == 1:
        return []
    compared = [row for row in table[1:] if row.difference is not None]
    if not compared:
        return ["One seed shows no spread: nothing can be said about differences between these rows."]
    best, worst = min(table, key=lambda row: row.mean), max(table, key=lambda row: row.mean)
    apart = [f"{row.contestant.name} ({row.difference:+.2f})" for row in compared if row.told_apart]
    lines = [
        f"The lowest mean error is that of {best.contestant.name} ({best.mean:.2f}), the highest that of "
        f"{worst.contestant.name} ({worst.mean:.2f}). Differences to the first row whose interval excludes 0: "
        f"{'; '.join(apart) or 'none'}, of {len(compared)}. An interval that contains 0 shows no difference, nor that "
        "there is none; one in twenty excludes 0 by chance alone."
    ]
    if setting.data == "digits":
        lines += [
            "",
            f"Runs this small ({seeds} seeds, 8×8 images, {setting.epochs} epochs) cannot confirm or refute the "
            "paper's ordering on CIFAR, whose differences are tenths of a per cent. They show how these networks learn "
            "from a few hundred small images with one recipe, tuned for none of them.",
        ]
    return lines


def _provenance(provenance: dict[str, str]) -> str:
    return "Made with " + ", ".join(f"{name} {value}" for name, value in provenance.items()) + "."


def as_json(results: list[Result], setting: Setting, provenance: dict[str, str]) -> dict[str, Any]:
    """Everything the table is made of."""
    return {
        "setting": setting.as_dict(),
        "provenance": provenance,
        "rows": [
            {
                "key": row.contestant.key,
                "name": row.contestant.name,
                "parameters": row.parameters,
                "mean_error": round(row.mean, 4),
                "standard_deviation": None if row.spread is None else round(row.spread, 4),
                "difference": None if row.difference is None else round(row.difference, 4),
                "half_width_95": None if row.half_width is None else round(row.half_width, 4),
                "paper": row.contestant.paper,
            }
            for row in rows(results)
        ],
        "runs": [
            {"key": r.key, "seed": r.seed, "torch": r.torch, "errors": r.errors, "train_losses": r.train_losses}
            for r in results
        ],
    }

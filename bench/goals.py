"""The project's speed goals, on an H200 and on two CPU threads, and what a results file says of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bench.cases import FIRST
from bench.results import Row, timed

Find = Callable[..., Row | None]
PARTS = {"eval": "evaluation", "step": "training step"}


def finder(contents: dict[str, Any]) -> Find:
    """A function that looks a timed row up; of several the last one, whose case has all contenders in its rounds."""

    def find(subject: str, part: str, batch: int, contender: str, dtype: str = "bfloat16") -> Row | None:
        wanted = (subject, part, batch, contender, dtype)
        rows = [
            row
            for row in contents["rows"]
            if tuple(row[k] for k in ("subject", "part", "batch", "contender", "dtype")) == wanted and "median" in row
        ]
        return rows[-1] if rows else None

    return find


def best(find: Find, subject: str, part: str, batch: int, dtype: str = "bfloat16") -> Row | None:
    """Our fastest form."""
    rows = [find(subject, part, batch, f"ours {how}", dtype) for how in ("eager", "compiled", "graph", "max-autotune")]
    return min((row for row in rows if row is not None), key=lambda row: row["median"], default=None)


def times_as_fast(find: Find, subject: str, part: str, batch: int, other: str, dtype: str = "bfloat16") -> float | None:
    ours, theirs = best(find, subject, part, batch, dtype), find(subject, part, batch, other, dtype)
    return None if ours is None or theirs is None else float(theirs["median"] / ours["median"])


class Goal(NamedTuple):
    """What is wanted and what was found; None: not measured."""

    what: str
    unit: str
    found: float | None
    wanted: float
    more: bool  # is better

    @property
    def sign(self) -> str:
        return "≥" if self.more else "≤"

    def verdict(self) -> str:
        if self.found is None:
            return ""
        return "reached" if (self.found >= self.wanted if self.more else self.found <= self.wanted) else "missed"

    def text(self) -> str:
        return "not measured" if self.found is None else f"{self.found:.2f} {self.unit}".strip()


def evaluated(contents: dict[str, Any]) -> list[Goal]:
    """The goals for the kind of machine that the results are from."""
    if "gpu" in contents["provenance"]:
        return on_gpu(contents)
    if any(row["dtype"] == "bfloat16" for row in contents["rows"]):
        return on_cpu_in_bfloat16(contents)
    return on_cpu(contents)


def on_cpu(contents: dict[str, Any]) -> list[Goal]:
    """Two threads, float32; by the medians, ours in its fastest form."""
    find = finder(contents)
    rows: list[Goal] = []
    for subject in (FIRST, "seqresnet_b22"):
        for part, batch, goal in (("eval", 8, 1.6), ("step", 4, 1.3)):
            name = PARTS[part]
            for other, wanted in (("reference eager", goal), ("reference compiled", 1.0)):
                value = times_as_fast(find, subject, part, batch, other, "float32")
                rows.append(Goal(f"{subject}, {name}, batch {batch}, against {other}", "×", value, wanted, True))
    return rows


def in_bfloat16(contents: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(subject, part, batch) of whatever has a bfloat16 time, forward and backward alone left out."""
    rows = timed(contents["rows"]).values()
    found = [(r["subject"], r["part"], r["batch"]) for r in rows if r["dtype"] == "bfloat16" and r["part"] in PARTS]
    return list(dict.fromkeys(found))


def on_cpu_in_bfloat16(contents: dict[str, Any]) -> list[Goal]:
    """Half as much again as float32 where the processor has the instructions; never slower than concatenating."""
    find = finder(contents)
    rows: list[Goal] = []
    for subject, part, batch in in_bfloat16(contents):
        half = find(subject, part, batch, "ours eager", "bfloat16")
        for what, who, dtype, goal in (
            ("its float32", "ours", "float32", 1.5),
            ("the concatenating code's", "reference", "bfloat16", 1.0),
        ):
            other = find(subject, part, batch, f"{who} eager", dtype)
            value = other["median"] / half["median"] if half and other else None
            name = f"{subject}, {PARTS[part]}, batch {batch}, bfloat16 against {what}"
            rows.append(Goal(name, "×", value, goal, True))
    return rows


def on_gpu(contents: dict[str, Any]) -> list[Goal]:
    """An H200, bfloat16, channels_last, 224²."""
    find = finder(contents)
    rows: list[Goal] = []

    def ratio(subject: str, part: str, batch: int, other: str, goal: float) -> None:
        name = PARTS[part]
        value = times_as_fast(find, subject, part, batch, other)
        rows.append(Goal(f"{subject}, {name}, batch {batch}, against {other}", "×", value, goal, True))

    ratio(FIRST, "eval", 256, "resnet50 compiled", 1)
    ratio(FIRST, "eval", 256, "reference compiled", 4)
    ours = best(find, FIRST, "eval", 256)
    rate = 256 / ours["median"] if ours else None
    rows.append(Goal(f"{FIRST}, evaluation, batch 256, two thirds of the stages' floor", "images/s", rate, 19500, True))
    ratio(FIRST, "step", 256, "resnet101 compiled", 1)
    ratio(FIRST, "step", 256, "reference compiled", 3)
    mine, peer = (find(FIRST, "step", 256, f"{who} compiled") for who in ("ours", "resnet50"))
    mine = mine or find(FIRST, "step", 256, "ours eager")
    memory = mine["peak_bytes"] / peer["peak_bytes"] if mine and peer else None
    rows.append(Goal(f"{FIRST}, training step, batch 256, peak memory over resnet50's", "", memory, 1, False))
    latency = find(FIRST, "eval", 1, "ours graph")
    rows.append(
        Goal(f"{FIRST}, latency, batch 1, CUDA graph", "ms", 1e3 * latency["median"] if latency else None, 1, False)
    )
    ratio(FIRST, "eval", 1, "resnet152 graph", 1)
    for subject in ("seqresnet_b22", "seqresnext_24"):
        for part in ("eval", "step"):
            ratio(subject, part, 256, "reference compiled", 3)
    for state, goal in (("cold", 30), ("warm", 5)):
        first = find(FIRST, "startup", 8, f"ours {state}")
        rows.append(
            Goal(f"{FIRST}, first compiled step, {state} caches", "s", first["median"] if first else None, goal, False)
        )
    return rows


def goals(contents: dict[str, Any]) -> str:
    """A line for every goal."""
    lines = [f"{'goal':<78}{'wanted':>18}{'found':>20}"]
    for goal in evaluated(contents):
        wanted = f"{goal.sign} {goal.wanted:g} {goal.unit}".rstrip()
        lines.append(f"{goal.what:<78}{wanted:>18}{goal.text():>20}  {goal.verdict()}".rstrip())
    return "\n".join(lines)

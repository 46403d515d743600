"""What a sceptic reads first: whole networks on all processors side by side, and all that is faster than ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.cases import MODELS
from bench.goals import PARTS, on_cpu
from bench.report import mebibytes, milliseconds
from bench.results import Row
from bench.tables import cases_of, dated, fastest, is_ours, is_peer, with_peers

Contents = dict[str, Any]


def networks(runs: Sequence[Contents]) -> str:
    """A line for every evaluation and training step of a whole network, eager; memory as the first run had it."""
    lines = [
        f"| concatenating → ours, eager | batch | {' | '.join(map(dated, runs))} | peak memory | kept per image |",
        "| --- " * (len(runs) + 4) + "|",
    ]
    found = [cases_of(run) for run in runs]
    for case in dict.fromkeys(case for cases in found for case in cases):
        subject, part, batch, _ = case
        if subject not in MODELS or part not in PARTS:
            continue
        pairs = [[cases.get(case, {}).get(f"{who} eager") for who in ("reference", "ours")] for cases in found]
        memory = (
            " → ".join(mebibytes(row.get(field, 0) / by) for row in pairs[0] if row is not None)
            for field, by in (("peak_bytes", 1), ("kept_bytes", batch))
        )
        cells = [f"{subject}, {PARTS[part]}", str(batch), *(sides(*pair) for pair in pairs), *memory]
        lines.append(f"| {' | '.join(cell.removeprefix(' → ') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def sides(theirs: Row | None, ours: Row | None) -> str:
    """ "753 → **563 ms**", the faster one in bold."""
    if theirs is None or ours is None:
        return ""
    before, after = (milliseconds(row["median"]) for row in (theirs, ours))
    if theirs["median"] < ours["median"]:
        return f"**{before}** → {after} ms"
    return f"{before} → **{after} ms**"


def again(runs: Sequence[Contents]) -> str:
    """The float32 goals once more, as further runs found them; nothing where they did not."""
    lines = []
    for run in runs:
        found = [
            f"{goal.what.partition(', against')[0]} {goal.text()}" for goal in on_cpu(run) if goal.found is not None
        ]
        if found:
            lines.append(f"- {dated(run)}: {'; '.join(found)}")
    return (
        "\n".join(["In the float32 rows of other runs, below, the same came out as:", "", *lines]) + "\n"
        if lines
        else ""
    )


def faster(runs: Sequence[Contents]) -> str:
    """What evaluates or trains faster than our network in our fastest form, in some run: a line each, over all runs."""
    ratios: dict[tuple[str, ...], list[float]] = {}
    for run in runs:
        for key, ratio in against(run):
            ratios.setdefault(key, []).append(ratio)
    others = {row["contender"].split()[0] for run in runs for row in run["rows"] if is_peer(row)}
    lines = [
        f"- {who}, {what}: {span(found)} times as fast as {subject}"
        for (subject, what, who), found in sorted(ratios.items(), key=lambda entry: entry[0])
        if max(found) > 1
    ]
    compared = f"Compared with the concatenating code and {', '.join(sorted(others)) or 'no other network'}."
    return "\n".join([compared, "", *(lines or ["- nothing is faster than ours"])]) + "\n"


def against(run: Contents) -> Iterator[tuple[tuple[str, ...], float]]:
    """(subject, case in words, who) and how many times as fast as ours, of one run."""
    for among, theirs in ((cases_of(run), False), (with_peers(run), True)):
        for (subject, part, batch, dtype), rows in among.items():
            own = fastest(rows, "ours")
            others = {
                row["contender"].split()[0] for row in rows.values() if not is_ours(row) and is_peer(row) == theirs
            }
            for who in others if subject in MODELS and part in PARTS and own < float("inf") else ():
                name = "the concatenating code" if who == "reference" else who
                yield (subject, f"{PARTS[part]}, batch {batch}, {dtype}", name), own / fastest(rows, who)


def span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"

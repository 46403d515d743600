"""Markdown tables of a results file: every case, where ours loses, the goals."""

from __future__ import annotations

import re
from typing import Any

from bench.goals import Goal, evaluated
from bench.peers import PUBLISHED
from bench.report import mebibytes, milliseconds, speed
from bench.results import Row, timed

Contents = dict[str, Any]
FORMS = ("eager", "compiled", "max-autotune", "fused", "graph", "plain")


def fastest(rows: dict[str, Row], who: str) -> float:
    return min((row["median"] for name, row in rows.items() if name.split()[0] == who), default=float("inf"))


def times(rows: dict[str, Row], who: str, other: str) -> str:
    """ "1051 ms; compiled 1012 ms after 5 s", the forms that beat everything of the other side in bold."""
    found = []
    for form in FORMS:
        row = rows.get(f"{who} {form}")
        if row is None:
            continue
        text = f"{milliseconds(row['median'])} ms"
        if row["median"] < fastest(rows, other):
            text = f"**{text}**"
        if form not in ("eager", "plain"):
            text = f"{form} {text}"
        if "compile_seconds" in row:
            text += f" after {row['compile_seconds']:.0f} s"
            if row["caches"] == "warm":
                text += " with warm caches"
        found.append(text)
    return "; ".join(found)


def cases_of(contents: Contents) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Timed rows by case and part, then by contender."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for (*case, contender), row in timed(contents["rows"]).items():
        cases.setdefault(tuple(case), {})[contender] = row
    return cases


def ratio_table(contents: Contents) -> str:
    """A line for every case; growth against depth and width is in a plot instead."""
    lines = [
        "| case | batch | concatenating | ours | speed | peak memory | kept per image | roofline |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (subject, part, batch, _), rows in cases_of(contents).items():
        ours = rows.get("ours eager") or rows.get("ours plain")
        who = "torch" if "torch plain" in rows else "reference"
        base = rows.get(f"{who} eager") or rows.get(f"{who} plain")
        if ours is None or part == "startup" or subject.startswith(("depth", "width", "dense width")):
            continue
        ratio = speed(ours, base)
        pairs = []
        for field, divisor in (("peak_bytes", 1), ("kept_bytes", batch)):
            sides = [mebibytes(row.get(field, 0) / divisor) for row in (base, ours) if row is not None]
            pairs.append(" → ".join(side for side in sides if side))
        share = f"{ours['roofline_seconds'] / ours['median']:.0%}" if "roofline_seconds" in ours else ""
        if "floor_seconds" in ours:
            share += f"; floor {ours['floor_seconds'] / ours['median']:.0%}"
        lines.append(
            f"| {subject}, {part} | {batch} | {times(rows, who, 'ours')} | {times(rows, 'ours', who)} | "
            f"{'' if ratio is None else f'{ratio:.2f} ×'} | {pairs[0]} | {pairs[1]} | {share} |"
        )
    return "\n".join(lines) + "\n"


def with_peers(contents: Contents) -> dict[tuple[Any, ...], dict[str, Row]]:
    """As `cases_of`, but only where peers took part, and of a case's entries in the table the one with most of them.

    Only what ran in turns may be compared: all rows of one are from the same rounds.
    """
    best: dict[tuple[Any, ...], dict[str, Row]] = {}
    for number in dict.fromkeys(row.get("case") for row in contents["rows"]):
        own = {"rows": [row for row in contents["rows"] if row.get("case") == number]}
        for case, rows in cases_of(own).items():
            if (count := peer_count(rows)) and count >= peer_count(best.get(case, {})):
                best[case] = rows
    return best


def peer_count(rows: dict[str, Row]) -> int:
    return sum(map(is_peer, rows.values()))


def peers_table(contents: Contents, best_only: bool = False) -> str:
    """Evaluations and training steps in which peers took part, the fastest first; nothing where none did.

    `best_only`: of ours and of the reference only the fastest form.
    """
    lines = [
        "| against other networks | | batch | time | images/s | peak memory | published top-1 error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (subject, part, batch, _), rows in with_peers(contents).items():
        if part not in ("eval", "step"):
            continue
        seen: set[str] = set()
        for row in sorted(rows.values(), key=lambda row: float(row["median"])):
            who, how = row["contender"].split()
            if best_only and who in seen:
                continue
            seen.add(who)
            network, own = (who, row["version"]) if is_peer(row) else (subject, who)
            published = f"{PUBLISHED[network].error:.2f} %" if network in PUBLISHED else ""
            name = f"{network}, {own}, {how}"
            lines.append(
                f"| {f'**{name}**' if is_ours(row) else name} | {part} | {batch} | {milliseconds(row['median'])} ms | "
                f"{batch / row['median']:.3g} | {mebibytes(row.get('peak_bytes'))} | {published} |"
            )
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def losses(contents: Contents) -> str:
    """Every case in which something else is faster than our fastest form, or needs less memory than our same form.

    Where we did not run in that form, it is compared with ours that needs least.
    """
    return "Where ours loses:\n\n" + "\n".join(loss_lines(contents) or ["- nowhere in this run"]) + "\n"


def loss_lines(contents: Contents) -> list[str]:
    lines = []
    for case, rows in cases_of(contents).items():
        lines += losses_of(case, {name: row for name, row in rows.items() if not is_peer(row)})
    for case, rows in with_peers(contents).items():
        lines += losses_of(case, {name: row for name, row in rows.items() if is_peer(row) or is_ours(row)})
    return lines


def losses_of(case: tuple[Any, ...], rows: dict[str, Row]) -> list[str]:
    """Those of one case, from its rows by contender."""
    (subject, part, batch, _), own = case, fastest(rows, "ours")
    if own == float("inf"):
        return []
    lines, where = [], f"{subject}, {part}, batch {batch}"
    memory = {
        row["contender"].split()[1]: row["peak_bytes"] for row in rows.values() if "peak_bytes" in row and is_ours(row)
    }
    for name, row in rows.items():
        if is_ours(row):
            continue
        if row["median"] < own:
            lines.append(f"- {where}: {name} is {own / row['median']:.2f} times as fast as ours")
        form = name.split()[1]
        own_memory = memory.get(form, min(memory.values(), default=0))
        if row.get("peak_bytes", own_memory) < own_memory:
            lines.append(f"- {where}: {name} needs {1 - row['peak_bytes'] / own_memory:.1%} less memory")
    return lines


def is_peer(row: Row) -> bool:
    return "version" in row


def is_ours(row: Row) -> bool:
    return bool(row["contender"].split()[0] == "ours")


def processor_of(contents: Contents) -> str:
    """ "Intel Xeon": without what is no part of a name."""
    return re.sub(r"\((R|TM)\)| Processor| CPU.*", "", str(contents["provenance"]["processor"]))


def machine(contents: Contents) -> str:
    """ "AMD EPYC (family 25, model 17)"."""
    model = contents["provenance"].get("processor_model")
    return processor_of(contents) + (f" ({model})" if model else "")


def dated(contents: Contents) -> str:
    """A run by its machine and day."""
    return f"{machine(contents)}, {contents['provenance']['date']}"


def goals_table(*runs: Contents) -> str:
    """A line for every goal, and what each run found; of several runs each under its processor's name and date."""
    heads = ["found"]
    if len(runs) > 1:
        heads = [dated(run) for run in runs]
    lines = [f"| goal | wanted | {' | '.join(heads)} |", "| --- " * (2 + len(runs)) + "|"]
    found = [{goal.what: goal for goal in evaluated(run)} for run in runs]
    for what, goal in {what: goal for goals in reversed(found) for what, goal in goals.items()}.items():
        cells = [outcome(goals.get(what)) for goals in found]
        lines.append(f"| {what} | {goal.sign} {goal.wanted:g} {goal.unit} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def outcome(goal: Goal | None) -> str:
    """ "1.34 ×, **missed**"."""
    if goal is None or not (verdict := goal.verdict()):
        return "not measured"
    return f"{goal.text()}, {'**missed**' if verdict == 'missed' else verdict}"

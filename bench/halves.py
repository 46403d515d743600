"""What bfloat16 gains on a CPU, and what it costs: everyone's float32 and bfloat16 times of one run, side by side."""

from __future__ import annotations

from typing import Any

from bench.goals import PARTS, finder, in_bfloat16
from bench.report import milliseconds


def markdown(contents: dict[str, Any]) -> str:
    """A line for every case and contender."""
    lines = ["| | batch | | float32 | bfloat16 | bfloat16 is |", "| --- | --- | --- | --- | --- | --- |"]
    find = finder(contents)
    for case in in_bfloat16(contents):
        subject, part, batch = case
        labels = [r["contender"] for r in contents["rows"] if (r["subject"], r["part"], r["batch"]) == case]
        for label in dict.fromkeys(labels):
            whole, half = (find(*case, label, dtype) for dtype in ("float32", "bfloat16"))
            if whole is None or half is None:
                continue
            who, _ = label.split()
            name = {"ours": f"**{subject}, ours**", "reference": f"{subject}, concatenating"}.get(who, who)
            lines.append(
                f"| {PARTS[part]} | {batch} | {name} | {milliseconds(whole['median'])} ms | "
                f"{milliseconds(half['median'])} ms | {whole['median'] / half['median']:.2f} × as fast |"
            )
    return "\n".join(lines) + "\n"

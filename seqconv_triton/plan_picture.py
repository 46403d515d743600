"""A plan as a small text picture: one row a group, one character a few channels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqconv_triton.plan import Plan

MAX_COLUMNS = 96
MAX_ROWS = 24
LEGEND = "= window   # written   + raw shortcut   . older features"


def draw(plan: Plan) -> str:
    """Rows of `.` (older features), `=` (the window), `#` (written) and `+` (raw shortcut) over the buffer."""
    k, total = plan.group_width, plan.total_channels
    cell = math.gcd(plan.in_channels, k)
    cell *= math.ceil(total / cell / MAX_COLUMNS)

    def columns(start: int, width: int) -> range:
        return range(start // cell, max(start // cell + 1, (start + width) // cell))

    rows = []
    for j, group in enumerate(plan.groups):
        row = ["."] * (plan.slot(j) // cell)
        for mark, start, width in (
            ("=", group.window_start, group.window_width),
            ("+", group.residual_start, k),
            ("#", plan.slot(j), k),
        ):
            if start is None:
                continue
            for c in columns(start, width):
                row += ["."] * (c + 1 - len(row))
                row[c] = mark
        rows.append(f"{j:>4}  {''.join(row)}")
    if len(rows) > MAX_ROWS:
        half = MAX_ROWS // 2
        rows[half:-half] = [f"   …  ({len(rows) - 2 * half} more groups)"]
    widths = sorted({group.window_width for group in plan.groups})
    window = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
    conv = "1×1 and 3×3" if plan.bottleneck else "3×3"
    subgroups = f" in {plan.subgroups} subgroups" if plan.subgroups > 1 else ""
    head = f"{plan.in_channels} channels + {len(plan.groups)} groups of {k}, window {window}, {conv} conv{subgroups}"
    tail = ""
    if plan.tail is not None:
        size = f"{plan.tail.kernel_size}×{plan.tail.kernel_size}"
        tail = (
            f"\ntail: {size} conv, stride {plan.tail.stride}, {plan.tail.groups} groups, "
            f"reads the last {plan.read_channels} channels, gives {plan.tail.out_channels}"
        )
    return f"{head}\n{LEGEND}; one character is {cell} channels\n" + "\n".join(rows) + tail

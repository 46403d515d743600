"""Windows over a row of channels as a small text picture: one row a group, one character a few channels."""

from __future__ import annotations

import math
from collections.abc import Iterable

MAX_COLUMNS = 96
MAX_ROWS = 24
LEGEND = "= window   # written   + raw shortcut   . older features"

# First channel and number of channels.
Span = tuple[int, int]


def draw(groups: Iterable[tuple[Span, Span, Span | None]], in_channels: int, group_width: int, total: int) -> str:
    """Rows of `.` (older features), `=` (the window), `#` (written) and `+` (raw shortcut) over `total` channels.

    A group is its window, its slot and, where it has one, its shortcut; slots have `group_width` channels.
    """
    cell = math.gcd(in_channels, group_width)
    cell *= math.ceil(total / cell / MAX_COLUMNS)
    rows = []
    for j, (window, slot, shortcut) in enumerate(groups):
        row = ["."] * (slot[0] // cell)
        for mark, span in (("=", window), ("+", shortcut), ("#", slot)):
            if span is None:
                continue
            first, last = span[0] // cell, max(span[0] // cell + 1, sum(span) // cell)
            row += ["."] * (last - len(row))
            row[first:last] = mark * (last - first)
        rows.append(f"{j:>4}  {''.join(row)}")
    if len(rows) > MAX_ROWS:
        half = MAX_ROWS // 2
        rows[half:-half] = [f"   …  ({len(rows) - 2 * half} more groups)"]
    return f"{LEGEND}; one character is {cell} channels\n" + "\n".join(rows)

"""Windows over a row of channels as a small text picture: one row a group, one character a few channels."""

from __future__ import annotations

import math
from collections.abc import Iterable

MAX_COLUMNS = 96
MAX_ROWS = 24
LEGEND = "= window   # written   + raw shortcut   . older features"

# Of a group: the window's first channel and width, the first channel written, the first of the shortcut.
Row = tuple[int, int, int, int | None]


def draw(groups: Iterable[Row], group_width: int, in_channels: int, total: int) -> str:
    """Rows of `.` (older features), `=` (the window), `#` (written) and `+` (raw shortcut) over `total` channels."""
    cell = math.gcd(in_channels, group_width)
    cell *= math.ceil(total / cell / MAX_COLUMNS)
    rows = []
    for j, (window, window_width, slot, shortcut) in enumerate(groups):
        row = ["."] * (slot // cell)
        for mark, start, count in (("=", window, window_width), ("+", shortcut, group_width), ("#", slot, group_width)):
            if start is None:
                continue
            first, last = start // cell, max(start // cell + 1, (start + count) // cell)
            row += ["."] * (last - len(row))
            row[first:last] = mark * (last - first)
        rows.append(f"{j:>4}  {''.join(row)}")
    if len(rows) > MAX_ROWS:
        half = MAX_ROWS // 2
        rows[half:-half] = [f"   …  ({len(rows) - 2 * half} more groups)"]
    return f"{LEGEND}; one character is {cell} channels\n" + "\n".join(rows)

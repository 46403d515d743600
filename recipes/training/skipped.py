"""The images that do not decode and were skipped: gathered from all processes, told by the main one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.training.distributed import Ranks

LISTED = 20  # an epoch; at the end all are


class Skipped:
    """What has been skipped so far, a line an image, each image once; `unreadable` is this process's growing list."""

    def __init__(self, ranks: Ranks, unreadable: Sequence[str]) -> None:
        self._ranks, self._unreadable, self._gathered = ranks, unreadable, 0
        self._lines: dict[str, None] = {}

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(self._lines)

    def gather(self) -> list[str]:
        """The lines that are new since the last call, of all processes; to be called by all of them."""
        lines = self._ranks.union(self._unreadable[self._gathered :])
        self._gathered = len(self._unreadable)
        new = [line for line in lines if line not in self._lines]
        self._lines |= dict.fromkeys(new)
        return new

    def report(self) -> None:
        """What is new, on standard error."""
        new = self.gather()
        if new and self._ranks.is_main:
            for line in new[:LISTED]:
                print(f"skipped, does not decode: {line}", file=sys.stderr)
            if len(new) > LISTED:
                print(f"… and {len(new) - LISTED} more", file=sys.stderr)
            print(f"so far {self._count()} skipped", file=sys.stderr)

    def warn(self) -> None:
        """All that was skipped, by name, as a warning on standard error."""
        self.gather()
        if self._lines and self._ranks.is_main:
            print("\n  ".join([f"warning: {self._count()} skipped:", *self._lines]), file=sys.stderr)

    def _count(self) -> str:
        count = len(self._lines)
        return f"{count} images that do not decode were" if count != 1 else "1 image that does not decode was"

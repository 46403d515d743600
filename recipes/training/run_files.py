"""A run's folder: last.pt, best.pt and log.csv, and what is in it where writing fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes import files
from recipes.training import checkpoint


class RunFiles:
    """The folder of a run, for its main process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.last, self.best = folder, folder / "last.pt", folder / "best.pt"
        self._saved = time.monotonic()

    def remove_leftovers(self) -> None:
        files.remove_leftovers(self.folder, ("last.pt", "best.pt", "log.csv"))

    def save(self, state: dict[str, Any]) -> None:
        """last.pt, which a run is resumed from."""
        with self.writing():
            checkpoint.save(state, self.last)
        self._saved = time.monotonic()

    def minutes_since_save(self) -> float:
        """Since last.pt was written by this process, or else since it began."""
        return (time.monotonic() - self._saved) / 60

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A full disk, and other errors of writing, also say what there is to go on from."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} ({self.what_remains()})", error.filename) from error

    def what_remains(self) -> str:
        """For a person: where a run that ends now can be resumed from."""
        return f"{self.last} is kept, --resume goes on from it" if self.last.exists() else "nothing was saved yet"

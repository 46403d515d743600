"""What a run tells: log.csv (one row an epoch), TensorBoard, a progress bar and a line an epoch."""

from __future__ import annotations

import csv
import io
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes import files


@dataclass(frozen=True)
class Row:
    """An epoch, counted from 1: losses in nats, errors in per cent, seconds of training without evaluation."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_error: float
    val_loss: float
    val_error: float
    images_per_second: float
    seconds: float

    def line(self, epochs: int, best: float) -> str:
        return (
            f"epoch {self.epoch:>{len(str(epochs))}}/{epochs}   lr {self.learning_rate:<8.4g} "
            f"train {self.train_loss:.4f} nats, {self.train_error:5.2f} %   "
            f"val {self.val_loss:.4f} nats, {self.val_error:5.2f} % (best {best:.2f} %)   "
            f"{self.images_per_second:,.0f} images/s"
        )


class Log:
    """Rows of finished epochs; `write` replaces log.csv as a whole, so that it is never half a row."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], *, tensorboard: bool) -> None:
        self._path = folder / "log.csv"
        self.rows = [Row(**row) for row in rows]
        self._board: Any = _summary_writer(folder, len(rows) + 1) if tensorboard else None

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()
        if self._board is not None:
            for name, value in asdict(row).items():
                if name != "epoch":
                    self._board.add_scalar(name.replace("_", "/", 1), value, row.epoch)
            self._board.flush()

    def write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.as_dicts())
        files.write(self._path, text.getvalue().encode())

    def as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _summary_writer(folder: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs it: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)


class Progress:
    """A bar an epoch with images/s, its time left, and the whole run's; silent where quiet, or with no terminal."""

    def __init__(self, epochs: int, images: int, *, shown: bool) -> None:
        self.epochs, self.images, self.shown = epochs, images, shown
        self._done, self._start = 0, time.perf_counter()
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            try:
                import tqdm
            except ImportError as error:
                raise ImportError(
                    "the progress bar needs tqdm: pip install seqconv-triton[train], or --quiet"
                ) from error
            self._tqdm = tqdm.tqdm
        else:
            self._tqdm = None

    def begin(self, epoch: int, images: int) -> None:
        """An epoch, of which `images` are done already."""
        self._epoch, self._initial = epoch, images
        if self._tqdm is not None:
            width = len(str(self.epochs))
            self._bar = self._tqdm(
                total=self.images, initial=images, desc=f"epoch {epoch:>{width}}/{self.epochs}", unit=" images",
                leave=False, dynamic_ncols=True,
            )  # fmt: skip

    def update(self, images: int, loss: float) -> None:
        """`images` of the epoch are done, with this mean loss."""
        self._done += images - self._initial
        self._initial = images
        if self._bar is not None:
            left = (self.epochs - self._epoch + 1) * self.images - images
            seconds = left * (time.perf_counter() - self._start) / max(self._done, 1)
            text = f"loss {loss:.3f}, run ends in {self._tqdm.format_interval(seconds)}"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(images - self._bar.n)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, text: str) -> None:
        """A line on standard output, above the bar."""
        if self.shown:
            self.end()
            print(text, flush=True)

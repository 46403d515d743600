"""What a data set gives a run: its classes, how its images are prepared, and batches by position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from recipes.training.images import Preprocess

Batch = tuple[Tensor, Tensor]  # images [B, C, H, W], normalised; labels [B], int64


class Source(Protocol):
    """A data set, split in training and validation images. `unreadable` names the images skipped so far."""

    classes: tuple[str, ...]
    preprocess: Preprocess
    unreadable: list[str]

    @property
    def train_images(self) -> int: ...

    @property
    def val_images(self) -> int: ...

    def train_batches(self, epoch: int, pieces: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Augmented batches of the training images with these indices; an image depends on (epoch, index) alone."""
        ...

    def val_batches(self, pieces: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Batches of the validation images with these indices, without those that do not decode."""
        ...

    def close(self) -> None:
        """End the loading processes."""
        ...

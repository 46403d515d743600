"""What a data set gives a run: its classes, how its images are prepared, and batches by position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from recipes.training import cifar
from recipes.training.config import Config
from recipes.training.images import Preprocess
from recipes.training.order import seed_for
from seqconv_triton.optional import require

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


class DigitsSource:
    """scikit-learn's handwritten digits, in memory; augmentation is a random shift."""

    def __init__(self, config: Config, preprocess: Preprocess | None = None) -> None:
        require("loading the digits", "train", "sklearn")
        from recipes.training import digits

        self._shift = digits.shift_randomly
        self._data = digits.load(config.train_images)
        self._seed, self._max_shift = config.seed, config.max_shift
        self.classes = tuple(str(digit) for digit in range(digits.CLASSES))
        mean, std = (self._data.mean,), (self._data.std,)
        self.preprocess = preprocess or Preprocess(1, 8, 8, mean, std, inverted=True)
        self.unreadable: list[str] = []

    @property
    def train_images(self) -> int:
        return len(self._data.train)

    @property
    def val_images(self) -> int:
        return len(self._data.test)

    def train_batches(self, epoch: int, pieces: Iterable[Sequence[int]]) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed_for(self._seed, "shift", epoch))
        shifted = self._shift(self._data.train.images, self._max_shift, generator)
        for piece in pieces:
            yield self.preprocess.normalize(shifted[list(piece)]), self._data.train.labels[list(piece)]

    def val_batches(self, pieces: Iterable[Sequence[int]]) -> Iterator[Batch]:
        for piece in pieces:
            yield self.preprocess.normalize(self._data.test.images[list(piece)]), self._data.test.labels[list(piece)]

    def close(self) -> None:
        pass


def open_source(config: Config, preprocess: Preprocess | None = None, *, pinned: bool = False) -> Source:
    """The data set of a run; `preprocess` replaces its own (a checkpoint's, for evaluation).

    Nothing is downloaded: raises FileNotFoundError with the folders it expects where they are not there.
    """
    if config.data == "digits":
        return DigitsSource(config, preprocess)
    assert config.root is not None
    if not Path(config.root).is_dir():
        raise FileNotFoundError(f"there is no folder {config.root} (root of {config.data}); {expected_layout(config)}")
    from recipes.training import vision

    return vision.open_source(config, preprocess, pinned=pinned)


def expected_layout(config: Config) -> str:
    """The files a data set is read from, in words."""
    assert config.root is not None
    if config.data == "imagefolder":
        return (
            f"imagefolder reads {config.root}/train/CLASS/*.jpg and {config.root}/val/CLASS/*.jpg (.png and others too)"
        )
    return cifar.layout(config.data, config.root)

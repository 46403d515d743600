"""The data sets of a run by name; the digits come with scikit-learn, the others are read from a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from recipes.training import cifar, imagefolder
from recipes.training.config import Config
from recipes.training.images import Preprocess
from recipes.training.order import seed_for
from recipes.training.source import Batch, Source
from seqconv_triton.optional import require


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
        imagefiles = config.data == "imagefolder"
        layout = imagefolder.layout(config.root) if imagefiles else cifar.layout(config.data, config.root)
        raise FileNotFoundError(f"there is no folder {config.root} (root of {config.data}); {layout}")
    from recipes.training import vision

    return vision.open_source(config, preprocess, pinned=pinned)

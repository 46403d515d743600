"""Samples of images on disk, read by worker processes: random numbers by position, undecodable images named.

An image's augmentation is seeded with (seed, epoch, index), so that neither the number of workers nor an interruption
changes it. In training the next image that decodes takes the place of one that does not; in validation it is left out.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.training.order import seed_for
from recipes.training.source import Batch

Key = tuple[int, int]  # epoch (0: validation), index of the image
MAX_UNREADABLE = 100  # so many bad images in a row, or in a batch, are not bad luck: a disk is gone


class Sample(NamedTuple):
    """`image` is None where nothing could be read; `unreadable` holds a line for each image that was not."""

    image: Tensor | None
    label: int
    unreadable: tuple[str, ...]


class Samples(Dataset[Sample]):
    """`dataset[index]` gives (decoded image, label), `transform` a tensor; only `indices` of it are seen."""

    def __init__(
        self, dataset: Any, transform: Callable[[Any], Tensor], indices: Sequence[int], *, seed: int, replace: bool
    ) -> None:
        self.dataset, self.transform, self.indices = dataset, transform, indices
        self.seed, self.replace = seed, replace

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Sample:
        from PIL.Image import DecompressionBombError

        unreadable: list[str] = []
        for i in range(MAX_UNREADABLE if self.replace else 1):
            index = self.indices[(key[1] + i) % len(self.indices)]
            try:
                image, label = self.dataset[index]
            except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:  # what pillow raises
                unreadable.append(f"{self._name(index)} ({str(error).splitlines()[0] if str(error) else error!r})")
            else:
                return Sample(self._transformed(image, key), label, tuple(unreadable))
        return Sample(None, -1, tuple(unreadable))

    def _name(self, index: int) -> str:
        return str(self.dataset.samples[index][0]) if hasattr(self.dataset, "samples") else f"image {index}"

    def _transformed(self, image: Any, key: Key) -> Tensor:
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(seed_for(self.seed, "augment", *key))
        try:
            return self.transform(image)
        finally:
            generator.set_state(before)


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Images [B, C, H, W] and labels [B] of the samples that have an image, and all lines on those that do not."""
    read = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    unreadable = [line for sample in samples for line in sample.unreadable]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0)
    return images, torch.tensor([label for _, label in read], dtype=torch.int64), unreadable


class _Pieces:
    """A batch sampler whose pieces are set anew for every epoch, so that the workers stay."""

    def __init__(self) -> None:
        self.pieces: Iterable[Sequence[int]] = ()
        self.epoch = 0

    def __iter__(self) -> Iterator[list[Key]]:
        for piece in self.pieces:
            yield [(self.epoch, index) for index in piece]


class Loader:
    """Batches of `samples`; images that do not decode are added to `unreadable`, or are an error where `strict`."""

    def __init__(self, samples: Samples, workers: int, unreadable: list[str], *, strict: bool, pinned: bool) -> None:
        self._sampler, self._unreadable, self._strict = _Pieces(), unreadable, strict
        self._loader: DataLoader[Any] = DataLoader(
            samples, batch_sampler=self._sampler, num_workers=workers, collate_fn=collate, pin_memory=pinned,
            persistent_workers=workers > 0, worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),
        )  # fmt: skip

    def batches(self, epoch: int, pieces: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Raises ValueError where strict and an image does not decode, OSError where hardly any does."""
        self._sampler.epoch, self._sampler.pieces = epoch, pieces
        for images, labels, unreadable in self._loader:
            if unreadable and self._strict:
                raise ValueError(f"an image does not decode: {unreadable[0]}")
            if len(unreadable) >= MAX_UNREADABLE:
                raise OSError(f"{len(unreadable)} images of one batch do not decode: {unreadable[0]} and others")
            self._unreadable.extend(line for line in dict.fromkeys(unreadable) if line not in self._unreadable)
            if len(labels):
                yield images, labels

    def close(self) -> None:
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def _leave_signals_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

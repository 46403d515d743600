"""Data for the ablation: what every network is trained and tested on, the same for one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.ablation.settings import Setting
from recipes.training import cifar
from recipes.training.source import Batch

MAX_SHIFT = 0.5  # pixels of an 8×8 digit
PADDING = 4  # pixels around a 32×32 image, before a random crop


@dataclass(frozen=True)
class Problem:
    """Batches of one epoch, anew at every call, and the test images [N, C, H, W], normalised, with their labels [N]."""

    epoch_batches: Callable[[], Iterable[Batch]]
    test: Batch
    train_images: int


def check_root(setting: Setting, root: Path | None) -> None:
    """Raises ValueError where the folder of a setting's data is missing or superfluous."""
    if (root is None) != (setting.data == "digits"):
        archive = cifar.FILES["cifar10"][1]
        need = "come with scikit-learn: leave root out" if root else f"must be named: --root DIR with {archive}"
        raise ValueError(f"root ({root}): the {setting.data} data {need}")


def load(setting: Setting, root: Path | None, seed: int) -> Problem:
    """The data of a setting; `root` is the folder of those that do not come with a package. Nothing is downloaded.

    Raises what check_root and cifar.load raise.
    """
    check_root(setting, root)
    generator = torch.Generator().manual_seed(seed)
    return digits(setting, seed, generator) if root is None else cifar10(setting, root, generator)


def digits(setting: Setting, seed: int, generator: torch.Generator) -> Problem:
    """The digits split the other way round, and anew for every seed: 360 images to learn from, 1,437 to test on.

    A network that has seen most of the digits errs on three or four others, which tells no two networks apart.
    """
    from recipes.training.digits import Digits
    from recipes.training.digits import load as load_digits

    usual = load_digits(split_seed=seed)
    ink = usual.test.images
    data = Digits(usual.test, usual.train, ink.mean().item(), ink.std().item())
    batches = partial(data.training_batches, setting.batch_size, MAX_SHIFT, generator)
    return Problem(batches, (data.normalize(data.test.images), data.test.labels), len(data.train))


def cifar10(setting: Setting, root: Path, generator: torch.Generator) -> Problem:
    """CIFAR-10+ from the Python archive in `root`: channels normalised, padded by 4, cropped and flipped."""
    (train_images, train_labels), (test_images, test_labels) = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
        for part in cifar.load("cifar10", root)
    )
    mean, std = channel_statistics(train_images)

    def batches() -> Iterator[Batch]:
        for chosen in torch.randperm(len(train_images), generator=generator).split(setting.batch_size):
            images = normalize(train_images[chosen], mean, std)
            yield crop_and_flip(images, generator), train_labels[chosen]

    return Problem(batches, (normalize(test_images, mean, std), test_labels), len(train_images))


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images [N, C, H, W], as fractions of 255."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    pixels = counts.sum(1)
    mean = counts @ values / pixels
    return mean.float(), (counts @ values.square() / pixels - mean.square()).sqrt().float()


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to float32 of mean 0 and deviation 1."""
    return (images.float() / 255 - mean[:, None, None]) / std[:, None, None]


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Each of [N, C, H, W] cut at a random place out of itself padded with zeros, and mirrored half of the time."""
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows, columns = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = rows + torch.arange(height), columns + torch.arange(width)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

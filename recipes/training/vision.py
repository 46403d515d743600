"""CIFAR and ImageFolder trees: torchvision's data sets and transforms, as sources of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recipes.training import cifar, imagefolder
from recipes.training.config import Config
from recipes.training.images import Preprocess
from recipes.training.loading import Loader, Samples
from recipes.training.source import Batch, Source

try:
    from torchvision.transforms import v2
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
    raise ImportError(f"CIFAR and ImageFolder need torchvision: pip install seqconv-triton[train] ({error})") from error

IMAGE_SIZE, IMAGE_RESIZE = 224, 256
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
}


class Lighting(nn.Module):
    """PCA lighting (Krizhevsky et al., 2012): adds Σ_i a_i·λ_i·v_i, a_i ~ N(0, deviation²), to every pixel."""

    # Principal components of ImageNet's RGB values, and the roots of their variances.
    VALUES = (0.2175, 0.0188, 0.0045)
    VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, values: Tensor) -> Tensor:
        """[3, H, W], 0 to 1."""
        amounts = torch.randn(3) * self.deviation * torch.tensor(self.VALUES)
        return values + (torch.tensor(self.VECTORS) @ amounts).view(3, 1, 1)


def training_transform(preprocess: Preprocess, *, photographs: bool) -> Callable[[Any], Tensor]:
    """The paper's augmentation of a decoded image: ImageNet's for photographs, else CIFAR's."""
    size = preprocess.image_size
    if photographs:
        first: list[nn.Module] = [
            v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4)
        ]  # fmt: skip
    else:
        first = [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()]
    last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), *([Lighting(0.1)] if photographs else [])]
    transform: Callable[[Any], Tensor] = v2.Compose([*first, *last, v2.Normalize(preprocess.mean, preprocess.std)])
    return transform


class VisionSource:
    """Two torchvision data sets of (image, label), for training and validation."""

    def __init__(
        self, config: Config, classes: Sequence[str], train: Any, val: Any, preprocess: Preprocess, *, pinned: bool
    ) -> None:
        self.classes, self.preprocess = tuple(classes), preprocess
        self.unreadable: list[str] = []
        subset: Sequence[int] = range(len(train))
        if config.train_images is not None:
            if config.train_images > len(train):
                raise ValueError(f"train_images ({config.train_images}) must be at most {len(train)}")
            generator = torch.Generator().manual_seed(0)
            subset = sorted(torch.randperm(len(train), generator=generator)[: config.train_images].tolist())
        augment = training_transform(preprocess, photographs=config.data == "imagefolder")
        training = Samples(train, augment, subset, seed=config.seed, replace=True)
        validation = Samples(val, preprocess, range(len(val)), seed=config.seed, replace=False)
        workers = min(8, os.cpu_count() or 1) if config.workers is None else config.workers
        self.train_images, self.val_images = len(training), len(validation)
        self._train, self._val = (
            Loader(samples, workers, self.unreadable, strict=config.strict, pinned=pinned)
            for samples in (training, validation)
        )

    def train_batches(self, epoch: int, pieces: Iterable[Sequence[int]]) -> Iterator[Batch]:
        return self._train.batches(epoch, pieces)

    def val_batches(self, pieces: Iterable[Sequence[int]]) -> Iterator[Batch]:
        return self._val.batches(0, pieces)

    def close(self) -> None:
        self._train.close()
        self._val.close()


def open_source(config: Config, preprocess: Preprocess | None, *, pinned: bool) -> Source:
    """CIFAR or an image tree; `preprocess` replaces the data set's own. Raises what the two `load` raise."""
    assert config.root is not None
    mean, std = STATISTICS[config.data]
    if config.data == "imagefolder":
        train, val = imagefolder.load(config.root)
        size = config.image_size or IMAGE_SIZE
        default = Preprocess(3, size, round(size * IMAGE_RESIZE / IMAGE_SIZE), mean, std)
    else:
        train, val = cifar.load(config.data, config.root)
        default = Preprocess(3, 32, 32, mean, std)
    return VisionSource(config, train.classes, train, val, preprocess or default, pinned=pinned)

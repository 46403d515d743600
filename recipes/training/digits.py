"""Handwritten digits: scikit-learn's bundled 1,797 grey images of 8×8 pixels, split, shuffled, shifted, normalised.

They are 8-bit counts of 0 to 16 ink pixels; here 0 to 1, background 0. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10
TEST_IMAGES = 360  # a fifth, 36 or so of every digit
SPLIT_SEED = 0  # the split stays the same whatever the seed of the training


@dataclass(frozen=True)
class Images:
    """Images [N, 1, 8, 8], float32 from 0 (paper) to 1 (ink), and their labels [N], int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """Training and test images, and the training images' mean and standard deviation."""

    train: Images
    test: Images
    mean: float
    std: float

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def training_batches(
        self, batch_size: int, max_shift: float, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch: shuffled, shifted and normalised ([B, 1, 8, 8], [B]); the last batch may be smaller."""
        order = torch.randperm(len(self.train), generator=generator)
        for chosen in order.split(batch_size):
            shifted = shift_randomly(self.train.images[chosen], max_shift, generator)
            yield self.normalize(shifted), self.train.labels[chosen]


def load(train_images: int | None = None, *, split_seed: int = SPLIT_SEED) -> Digits:
    """The stratified split; `train_images` keeps that many of the training images, stratified too (for quick runs)."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    train, test = _stratified(range(len(labels)), labels, TEST_IMAGES, split_seed)
    if train_images is not None:
        if not CLASSES <= train_images <= len(train):
            raise ValueError(f"train_images ({train_images}) must be from {CLASSES} to {len(train)}")
        if train_images <= len(train) - CLASSES:
            _, train = _stratified(train, labels, train_images, split_seed)
    ink = images[train]
    return Digits(Images(ink, labels[train]), Images(images[test], labels[test]), ink.mean().item(), ink.std().item())


def _stratified(indices: range | list[int], labels: Tensor, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """`indices` without and with the held out ones, every digit in proportion."""
    rest, test = train_test_split(
        list(indices), test_size=held_out, stratify=labels[list(indices)].numpy(), random_state=seed
    )
    return rest, test


def shift_randomly(images: Tensor, max_shift: float, generator: torch.Generator) -> Tensor:
    """Each of [N, 1, H, W] moved by up to `max_shift` pixels along x and y, fractions interpolated, paper moved in."""
    if max_shift == 0:
        return images
    count, _, height, width = images.shape
    pixels = (2 * torch.rand(count, 2, generator=generator) - 1) * max_shift
    moves = torch.eye(2, 3).repeat(count, 1, 1)
    moves[:, :, 2] = pixels * torch.tensor([2 / width, 2 / height])  # the grid runs from −1 to 1
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)

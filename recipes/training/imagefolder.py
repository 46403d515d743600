"""Trees of image files, a folder a class, on disk: found and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def layout(root: Path) -> str:
    """The files that `load` reads, in words."""
    return f"imagefolder reads {root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg (.png and others too)"


def load(root: Path) -> tuple[Any, Any]:
    """torchvision's data sets for training and for validation.

    Raises FileNotFoundError where there are no such folders, ValueError where their classes are not the same,
    ImportError without torchvision.
    """
    from torchvision import datasets

    try:
        train, val = (datasets.ImageFolder(str(root / part)) for part in ("train", "val"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {layout(root)}") from error
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"{root}/train and {root}/val have different classes: {', '.join(differing[:5])}")
    return train, val

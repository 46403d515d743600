"""Image files to tensors, as evaluation sees them: pillow alone, the same for `evaluate`, `predict` and training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Preprocess:
    """The shorter side to `resize` pixels (bilinear, antialiased), the central image_size², (value − mean) / std.

    Values are 0 to 1; `inverted` takes black for 1 (ink on paper). `channels` is 3 (RGB) or 1 (grey).
    """

    channels: int
    image_size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    inverted: bool = False

    def __call__(self, image: Image) -> Tensor:
        """A decoded image to a normalised tensor [channels, image_size, image_size]."""
        from PIL.Image import Resampling

        image = image.convert("RGB" if self.channels == 3 else "L")
        width, height = image.size
        short = min(width, height)
        if short != self.resize:
            image = image.resize(
                (max(1, self.resize * width // short), max(1, self.resize * height // short)), Resampling.BILINEAR
            )
        left, top = (round((side - self.image_size) / 2) for side in image.size)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        values = torch.from_numpy(np.array(image)).view(self.image_size, self.image_size, self.channels)
        values = values.permute(2, 0, 1).float() / 255
        return self.normalize(1 - values if self.inverted else values)

    def normalize(self, values: Tensor) -> Tensor:
        """[…, channels, H, W] from 0 to 1, normalised."""
        mean, std = (torch.tensor(channels).view(-1, 1, 1) for channels in (self.mean, self.std))
        return (values - mean) / std

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        return cls(**values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})


def decode(path: Path) -> Image:
    """An image file, wholly decoded, as RGB or as it is where that is grey.

    Raises OSError where it cannot be read and ValueError, naming it, where it is empty or does not decode.
    """
    from PIL import Image, UnidentifiedImageError

    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image")
    if path.exists() and path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes)")
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image that pillow knows") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} does not decode: {error}") from error

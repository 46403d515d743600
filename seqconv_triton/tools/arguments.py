"""Options that several commands have: the model, its images, the dtype and the GPU that kernels are compiled for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch

from seqconv_triton.models.backbone import Backbone

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_model(
    parser: argparse.ArgumentParser, *, batch: int, architectures: Iterable[str] = ARCHITECTURES, arch: str = ""
) -> None:
    """Of `batch` images where nobody says how many; `arch` says what --arch is for."""
    parser.add_argument("model", nargs="?", default="seqresnet_b42", help="a model's name (default: seqresnet_b42)")
    parser.add_argument("--arch", choices=architectures, default="sm_90", help=f"{arch}(default: sm_90)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the features (default: bfloat16)")
    parser.add_argument("--batch", type=int, default=batch, help=f"images (default: {batch})")
    add_image_size(parser)


def add_image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-size", type=int, help="pixels (default: the paper's, 224 or 32)")


def images_of(arguments: argparse.Namespace, model: Backbone) -> tuple[int, int, int, int]:
    """[N, 3, H, W] as --batch and --image-size say; without the latter, the side of the paper's images.

    Raises ValueError where one of them is below 1.
    """
    size = model.image_size if arguments.image_size is None else arguments.image_size
    for option, given in {"--batch": arguments.batch, "--image-size": size}.items():
        if given < 1:
            raise ValueError(f"{option} ({given}) must be at least 1")
    return arguments.batch, 3, size, size

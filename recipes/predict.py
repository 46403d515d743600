"""`python -m recipes.predict`: the likeliest classes of image files, in words and as a contact sheet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recipes import commands, files
from recipes.training import images, trained
from recipes.training.distributed import usable_device
from recipes.training.evaluation import class_probabilities
from seqconv_triton.optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 64  # images decoded at a time
ON_SHEET = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="files that pillow can read")
    parser.add_argument("--sheet", type=Path, default=Path("predictions.png"), metavar="PATH",
                        help=f"contact sheet of the first {ON_SHEET} (default: predictions.png)")  # fmt: skip
    parser.add_argument("--device", default="cpu", metavar="NAME", help="default: cpu")
    parser.add_argument("--strict", action="store_true", help="stop at an image that does not decode")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Exit status 0; 1 where images had to be skipped, which are named and counted on standard error."""
    require("predict", "train", "matplotlib", "PIL")
    from recipes.figures.sheets import Prediction, prediction_sheet

    network = trained.load(arguments.checkpoint, usable_device(arguments.device))
    predictions: list[Prediction] = []
    skipped = done = 0
    for start in range(0, len(arguments.images), CHUNK):
        chunk = []
        for path in arguments.images[start : start + CHUNK]:
            try:
                chunk.append((path, images.decode(path)))
            except (OSError, ValueError) as error:
                if arguments.strict:
                    raise
                print(f"skipped: {error}", file=sys.stderr)
                skipped += 1
        rows = _probabilities(network, [image for _, image in chunk])
        for (path, image), probabilities in zip(chunk, rows, strict=True):
            answers = top(probabilities, network.classes)
            print(f"{path}: " + ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in answers))
            done += 1
            if len(predictions) < ON_SHEET:
                image.thumbnail((256, 256))
                predictions.append(Prediction(path, image, answers))
    if predictions:
        files.write(arguments.sheet, prediction_sheet(predictions))
        shown = "" if done <= ON_SHEET else f" (the first {ON_SHEET} of {done} images)"
        print(f"contact sheet: {arguments.sheet}{shown}")
    if skipped:
        print(f"{skipped} of {len(arguments.images)} images skipped", file=sys.stderr)
    return int(skipped > 0)


def top(probabilities: Tensor, classes: tuple[str, ...], count: int = 5) -> list[tuple[str, float]]:
    """The `count` likeliest of `probabilities` [classes], best first."""
    values, indices = probabilities.topk(min(count, len(classes)))
    return [(classes[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]


def _probabilities(network: trained.Trained, decoded: list[Image]) -> Tensor:
    """[images, classes], on the CPU."""
    if not decoded:
        return torch.empty(0)
    return class_probabilities(network.model, torch.stack([network.preprocess(image) for image in decoded]))


def main(argv: list[str] | None = None) -> int:
    """`python -m recipes.predict`."""
    return commands.run("predict", add_arguments, run_from_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())

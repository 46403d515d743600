"""`python -m recipes.evaluate`: loss and errors of a checkpoint on a validation set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes import commands
from recipes.training import trained
from recipes.training.checkpoint import mismatch
from recipes.training.config import Config
from recipes.training.data import open_source
from recipes.training.distributed import processes
from recipes.training.evaluation import evaluate
from recipes.training.order import evaluation_pieces
from recipes.training.recipe import PRESETS
from recipes.training.skipped import Skipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("--data", choices=tuple(PRESETS), help="default: what it was trained on")
    parser.add_argument("--root", type=Path, metavar="PATH", help="folder of the data (not for digits)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, … (default: cuda where there is one)")
    parser.add_argument("--workers", type=int, metavar="N", help="loading processes (default: up to 8)")
    parser.add_argument("--strict", action="store_true", help="stop at an image that does not decode")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Exit status 0; 1 where images do not decode, which are named on standard error, counted, and left out."""
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size ({arguments.batch_size}) must be at least 1")
    with processes(arguments.device) as ranks:
        network = trained.load(arguments.checkpoint, ranks.device)
        config = Config(
            data=arguments.data or network.data, root=arguments.root, workers=arguments.workers, strict=arguments.strict
        )
        source = open_source(config, network.preprocess, pinned=ranks.device.type == "cuda")
        try:
            if network.classes != source.classes:
                raise ValueError(f"{arguments.checkpoint}: {mismatch(network.classes, source.classes)}")
            pieces = evaluation_pieces(
                source.val_images, arguments.batch_size, world=ranks.world, rank=ranks.rank
            )  # fmt: skip
            result = evaluate(network.model, source.val_batches(pieces), ranks)
        finally:
            source.close()
        skipped = Skipped(ranks, source.unreadable)
        skipped.warn()
        if ranks.is_main:
            top5 = "" if result.top5_error is None else f", top-5 error {result.top5_error:.2f} %"
            print(f"{result.images:,} images: error {result.error:.2f} %{top5}, cross-entropy {result.loss:.4f} nats")
    return int(bool(skipped.lines))


def main(argv: list[str] | None = None) -> int:
    """`python -m recipes.evaluate`."""
    return commands.run("evaluate", add_arguments, run_from_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())

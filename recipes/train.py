"""`python -m recipes.train`, alone or behind torchrun."""

from __future__ import annotations

import argparse
import sys

import torch

from recipes import commands
from recipes.training import config, run
from recipes.training.interrupts import Stopped

PROGRAM = commands.program("train")
EPILOG = """\
exit status: 0 trained (a warning names images that were skipped because they do not decode); 1 the loss was not finite;
2 wrong settings, data or checkpoint, a disk or memory that is full; 130 Ctrl-C and 143 SIGTERM, both after saving (a
second Ctrl-C ends at once).
Several processes: torchrun --nproc-per-node=N -m recipes.train …"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    config.add_arguments(parser)


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Exit status, as in EPILOG."""
    try:
        run.train(config.from_arguments(arguments))
    except (Stopped, FloatingPointError) as error:
        if arguments.debug:
            raise
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.status if isinstance(error, Stopped) else 1
    except torch.OutOfMemoryError as error:
        if arguments.debug:
            raise
        reason = str(error).splitlines()[0]
        print(f"{PROGRAM}: {reason} (a smaller --batch-size, or --accumulate?)", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """`python -m recipes.train`."""
    return commands.run("train", add_arguments, run_from_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())

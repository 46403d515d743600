"""The commands by name, and what `python -m recipes.NAME` does for each of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from seqconv_triton.cli import exit_status

COMMANDS = {
    "demo": "train a small network on handwritten digits",
    "train": "train a model by the paper's recipe, alone or under torchrun",
    "evaluate": "a checkpoint's errors on a validation set",
    "predict": "the likeliest classes of image files",
    "heatmap": "draw which group uses which (Figure 5), from a checkpoint",
    "history": "plot the training curves of several runs (Figure 4)",
    "ablation": "train the ablation's networks (Table 5) and equal baselines",
}


def program(name: str) -> str:
    """How a command is called."""
    return f"python -m recipes.{name}"


def run(
    name: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run_from_arguments: Callable[[argparse.Namespace], int],
    argv: list[str] | None = None,
) -> int:
    """Parse `argv` (default: the command line), run the command, and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=program(name), description=COMMANDS[name])
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_arguments(parser)
    return exit_status(parser.prog, lambda: run_from_arguments(parser.parse_args(argv)), debug="--debug" in argv)

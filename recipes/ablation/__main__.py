"""`python -m recipes.ablation`: trains every network from every seed and writes the table."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from recipes import commands
from recipes.ablation.comparison import compare
from recipes.ablation.settings import CONTESTANTS, SETTINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", choices=SETTINGS, default="digits", help="default: digits, some minutes on a CPU")
    parser.add_argument("--root", type=Path, help="folder of CIFAR-10's archive for Python (cifar10 only)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default: 3)")
    parser.add_argument("--epochs", type=int, help="default: 30 on digits, the paper's 300 on cifar10")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help=f"some of {', '.join(CONTESTANTS)}")
    parser.add_argument("--output", type=Path, help="folder (default: out/ablation-DATA); finished runs there are kept")
    parser.add_argument("--device", help="cpu, cuda, …; default: cuda where there is one")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Exit status 0; ValueError for arguments that fit nothing."""
    setting = SETTINGS[arguments.data]
    if arguments.epochs is not None:
        setting = dataclasses.replace(setting, epochs=arguments.epochs)
    table = compare(
        setting,
        arguments.output or Path("out") / f"ablation-{arguments.data}",
        seeds=arguments.seeds,
        networks=arguments.networks,
        root=arguments.root,
        device=arguments.device,
    )
    print(table)
    return 0


def main(argv: list[str] | None = None) -> int:
    """`python -m recipes.ablation`."""
    return commands.run("ablation", add_arguments, run_from_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m seqconv_triton`: info, demo, kernels."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import seqconv_triton as sct

Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]


def info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model's name; without one, a line for every model")
    parser.add_argument("--image-size", type=int, help="pixels (default: 224, or 32 for the CIFAR models)")
    parser.add_argument("--windows", action="store_true", help="also draw the windows of every stage")


def info(arguments: argparse.Namespace) -> int:
    """Print one model's summary, or a line for each."""
    from seqconv_triton.summary import render, summarize

    if arguments.model is not None:
        print(render(summarize(arguments.model, arguments.image_size), arguments.windows))
        return 0
    print(f"{'model':<34}{'parameters':>12}{'tensors':>9}{'G mult-adds':>13}{'paper GFLOPs':>14}{'MiB kept':>10}")
    for name in sct.list_models():
        one = summarize(name, arguments.image_size)
        print(
            f"{name:<34}{one.parameters:>12,}{one.parameter_tensors:>9}{one.multiply_adds / 1e9:>13.4f}"
            f"{one.paper_gflops:>14.2f}{one.kept_bytes / 2**20:>10.1f}",
            flush=True,
        )
    return 0


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    from seqconv_triton.training import demo

    demo.add_arguments(parser)


def demo(arguments: argparse.Namespace) -> int:
    from seqconv_triton.training import demo

    return demo.run_from_arguments(arguments)


def kernels_arguments(parser: argparse.ArgumentParser) -> None:
    from seqconv_triton.kernels import report

    report.add_arguments(parser)


def kernels(arguments: argparse.Namespace) -> int:
    from seqconv_triton.kernels import report

    return report.run_from_arguments(arguments)


COMMANDS: dict[str, Command] = {
    "info": ("a model's stages, parameters, multiply-adds and memory", info_arguments, info),
    "demo": ("train a small network on handwritten digits", demo_arguments, demo),
    "kernels": ("compile the Triton kernels of a model ahead of time", kernels_arguments, kernels),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; errors that name a wrong input become one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="seqconv-triton", description=sct.__doc__)
    parser.add_argument("--version", action="version", version=f"seqconv-triton {sct.__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (text, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add_arguments(command)
        command.set_defaults(run=run)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except (ValueError, TypeError, OSError) as error:
        if arguments.debug:
            raise
        if isinstance(error, BrokenPipeError):  # `… | head` closed the pipe: nothing is wrong
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130

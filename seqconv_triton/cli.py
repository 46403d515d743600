"""`python -m seqconv_triton`: a table of commands, each of which lives in the module that does its work."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import seqconv_triton as sct


class Command(NamedTuple):
    """`module` has add_arguments(parser) and run_from_arguments(arguments) → exit status."""

    text: str
    module: str


COMMANDS = {
    "info": Command("a model's stages, parameters, multiply-adds and memory", "seqconv_triton.tools.info"),
    "kernels": Command("compile the Triton kernels of a model ahead of time", "seqconv_triton.tools.kernels"),
    "cost": Command("the least time of a model's kernels on a GPU", "seqconv_triton.tools.cost_command"),
    "tune": Command("measure the kernels' configurations on a GPU", "seqconv_triton.tools.tune"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="seqconv-triton", description=sct.__doc__)

    def command() -> int:
        add_commands(parser, argv)
        arguments = parser.parse_args(argv)
        status: int = arguments.run(arguments)
        return status

    return exit_status(parser.prog, command, debug="--debug" in argv)


def exit_status(program: str, command: Callable[[], int], *, debug: bool) -> int:
    """What `command` returns. An error about a wrong input becomes one line on standard error and 2, Ctrl-C 130.

    With `debug` such errors are raised.
    """
    try:
        return command()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if debug:
            raise
        if isinstance(error, BrokenPipeError):  # `… | head` closed the pipe: nothing is wrong
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def add_commands(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """All commands; the modules of those that `argv` does not name need not be imported."""
    parser.add_argument("--version", action="version", version=f"seqconv-triton {sct.__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (text, module) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in argv:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
            command.set_defaults(run=implementation.run_from_arguments)

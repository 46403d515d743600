"""`python -m bench COMMAND`, one of those below; without a command: run."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

COMMANDS = {
    "run": ("time a table of cases on this machine (the default)", "bench.run"),
    "compare": ("ratios between two results files", "bench.compare"),
    "plot": ("draw a results file again", "bench.plots"),
    "document": (
        "write the measured tables of README and docs from the results files, or check them",
        "bench.document",
    ),
    "launches": ("count the Triton backend's launches; needs no GPU", "bench.launches"),
    "gpu": ("GPU tests, then the GPU table, in nine minutes; --dry-run predicts without a GPU", "bench.gpu"),
    "compile": ("what torch.compile costs from empty caches, B42 beside ResNet-50", "bench.compilation"),
    "floors": ("what the ImageNet networks take at least on a GPU, by their machine code", "bench.floors"),
    "compiled": ("every kernel for every architecture and dtype: instructions and spills", "bench.compiled"),
    "show": ("what the library is for: B42 beside the concatenating code, in a minute", "bench.showcase"),
    "int8": ("SeqResNet-B22 quantised by torchao beside ResNet-50: convs found, speed, distance", "bench.int8"),
    "startup": ("seconds to B42's first compiled training step, caches cold and warm", "bench.startup"),
}


def main(given: list[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["run", *given]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts bytes here; its log would tear the table
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, module) in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text)
        if given[0] == name:
            importlib.import_module(module).add_arguments(one)
    arguments = parser.parse_args(given)
    from bench.results import BadResults

    try:
        return int(importlib.import_module(COMMANDS[arguments.command][1]).run_from_arguments(arguments))
    except BadResults as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

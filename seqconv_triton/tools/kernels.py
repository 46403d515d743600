"""`python -m seqconv_triton kernels`: compile a model's kernels for a named architecture and say what came out."""

from __future__ import annotations

import argparse
import sys

from seqconv_triton.models.registry import create_model
from seqconv_triton.optional import require
from seqconv_triton.tools.arguments import DTYPES, add_model, images_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, batch=32)  # only its divisibility by 16 matters
    parser.add_argument("--tuned", metavar="GPU", help='with the table that ships for a GPU, such as "NVIDIA H200"')


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Print a line for every distinct kernel; 1 if any spills or needs more shared memory than there is."""
    require("kernels", "triton", "triton")
    import triton

    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing can be compiled while kernels are interpreted", file=sys.stderr)
        return 2
    from seqconv_triton.kernels.configs import shipped
    from seqconv_triton.tools.ahead import SHARED_LIMIT, compile_all, launches

    tables = () if arguments.tuned is None else (shipped(arguments.tuned),)
    if tables == ({},):
        raise ValueError(f"no table ships for {arguments.tuned!r} (docs/tuning.md: how to contribute one)")
    model = create_model(arguments.model, device="meta")
    batch, _, size, _ = images_of(arguments, model)
    found = launches(model, size, batch, DTYPES[arguments.dtype], arguments.arch, tables=tables)
    print(f"{arguments.model}, {arguments.dtype}, {arguments.arch}: {len(found)} distinct kernels")
    print(f"{'kernel':<20}{'tile':>12}{'taps':>5}{'warps':>6}{'registers':>10}{'spills':>7}", end="")
    print(f"{'shared':>8}{'matrix':>8}{'load':>5}{'narrow':>7}{'occupancy':>10}")
    wrong = 0
    for item in compile_all(found, arguments.arch):
        constants = dict(item.launch.constants)
        sides = (constants.get(name) for name in ("BLOCK_P", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_T", "BLOCK_C"))
        tile = "×".join(str(side) for side in sides if side)
        wrong += item.spills > 0 or item.shared > SHARED_LIMIT[arguments.arch]
        print(
            f"{item.launch.name:<20}{tile:>12}{constants.get('KERNEL', 0) ** 2 or '':>5}{item.launch.num_warps:>6}"
            f"{item.registers:>10}{item.spills:>7}{item.shared:>8}{item.instruction:>8}{item.load_bits:>5}"
            f"{item.narrow_loads:>7}{item.occupancy:>10.0%}",
            flush=True,
        )
    print(f"{wrong} of {len(found)} spill registers or exceed shared memory")
    return 1 if wrong else 0

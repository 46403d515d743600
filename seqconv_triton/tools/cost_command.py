"""`python -m seqconv_triton cost`: the least time of a model's stages on a GPU, by kernel and in all, beside ResNets'.

Compiles the kernels and reads their machine code (`cost.py`); no GPU is needed and nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seqconv_triton.models.registry import create_model
from seqconv_triton.optional import require
from seqconv_triton.tools import peers
from seqconv_triton.tools.arguments import DTYPES, add_model, images_of
from seqconv_triton.tools.ceilings import GPUS, Gpu

if TYPE_CHECKING:
    from seqconv_triton.tools.cost import Work

MODES = {"eval": "evaluation", "folded": "evaluation, BNs folded", "train": "training step"}
NETWORKS = f"{'network':<24}{'':<24}{'launches':>9}{'bytes ms':>10}{'FLOP ms':>10}{'issue ms':>10}{'floor ms':>10}"

LEGEND = """\
floor: the sum over launches of the largest of bytes, FLOPs and issue time; roofline: of the first two.
Ours: the stages, without stem, classifier and PyTorch's own small ops."""
PEERS = """\
ResNets: their roofline as a floor, no issue slots counted. A conv reads input and weight and writes its output once;
BN-ReLU(-add) is one pass in evaluation; in training statistics read once, normalising reads and writes, BN's backward
is two passes over three tensors each, a conv's backward two convs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, batch=256, architectures=GPUS)
    parser.add_argument("--mode", choices=("eval", "train", "both"), default="both", help="(default: both)")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Print the kernels and the sums of every mode, then the peers' rooflines."""
    require("cost", "triton", "triton")
    import triton

    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing can be compiled while kernels are interpreted", file=sys.stderr)
        return 2
    model = create_model(arguments.model, device="meta")
    images = images_of(arguments, model)
    from seqconv_triton.tools.cost import model_work

    gpu, dtype = GPUS[arguments.arch], DTYPES[arguments.dtype]
    if arguments.dtype == "float32":
        gpu = gpu.in_tf32()
    print(f"{arguments.arch}, {arguments.dtype}, batch {arguments.batch}, {images[-1]}² pixels; {gpu}")
    sums = []
    for mode in ("eval", "train") if arguments.mode == "both" else (arguments.mode,):
        works = model_work(model, images, dtype, mode == "train", arguments.arch)
        print(f"\n{arguments.model}, {MODES[mode]}", *kernel_lines(works, gpu, arguments.arch), sep="\n", flush=True)
        sums.append(model_line(arguments.model, mode, works, gpu, arguments.arch, arguments.batch))
    print("", NETWORKS + f"{'÷ roofline':>11}{'images/s':>10}", *sums, sep="\n")
    print(LEGEND)
    if images[-1] % 32 == 0 and images[-1] > 32:
        print(*peer_lines(arguments.mode, arguments.batch, gpu, dtype.itemsize, images[-1]), PEERS, sep="\n")
    return 0


def kernel_lines(works: Sequence[Work], gpu: Gpu, architecture: str) -> list[str]:
    """A line for every kernel family and tile, the longest floor first."""
    from seqconv_triton.tools.cost import by_kernel, total

    head = f"{'kernel':<24}{'tile':<14}{'launches':>9}{'bytes ms':>10}{'FLOP ms':>10}{'issue ms':>10}{'floor ms':>10}"
    totals = {key: total(group, gpu, architecture) for key, group in by_kernel(works).items()}
    lines = [head + f"{'instructions':>14}{'a step':>8}"]
    for (family, tile), t in sorted(totals.items(), key=lambda entry: -entry[1].floor_seconds):
        sides = "×".join(map(str, tile)) if any(tile) else ""
        lines.append(
            f"{family:<24}{sides:<14}{t.launches:>9}{1e3 * t.bytes_seconds:>10.3f}{1e3 * t.operations_seconds:>10.3f}"
            f"{1e3 * t.issue_seconds:>10.3f}{1e3 * t.floor_seconds:>10.3f}{t.instructions:>14,.0f}"
            f"{f'{t.step_instructions:.0f}' if t.step_instructions else '':>8}"
        )
    return [*lines, "instructions: of a warp in one program; a step: one product of a tile"]


def model_line(name: str, mode: str, works: Sequence[Work], gpu: Gpu, architecture: str, batch: int) -> str:
    from seqconv_triton.tools.cost import total

    t = total(works, gpu, architecture)
    return (
        f"{name:<24}{MODES[mode]:<24}{t.launches:>9}{1e3 * t.bytes_seconds:>10.2f}{1e3 * t.operations_seconds:>10.2f}"
        f"{1e3 * t.issue_seconds:>10.2f}{1e3 * t.floor_seconds:>10.2f}{t.floor_seconds / t.roofline_seconds:>11.3f}"
        f"{batch / t.floor_seconds:>10,.0f}"
    )


def peer_lines(mode: str, batch: int, gpu: Gpu, element_size: int, size: int) -> list[str]:
    """Of networks whose machine code is not here: their roofline in the place of a floor, and what it assumes."""
    lines = []
    for name in peers.BLOCKS:
        for kind in ("eval", "folded", "train"):
            if mode == "both" or (mode == "train") == (kind == "train"):
                r = peers.roofline(name, kind, batch, gpu, element_size, size)
                lines.append(
                    f"{name:<24}{MODES[kind]:<24}{r.launches:>9}{1e3 * r.bytes_seconds:>10.2f}"
                    f"{1e3 * r.operations_seconds:>10.2f}{'':>10}{1e3 * r.roofline_seconds:>10.2f}{'':>11}"
                    f"{batch / r.roofline_seconds:>10,.0f}"
                )
    return lines

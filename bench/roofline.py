"""The launches of any module by part, and their least seconds by bytes, FLOPs and, from machine code, issue slots.

What a launch costs is counted in `seqconv_triton/tools/cost.py`; nothing runs and no GPU is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from seqconv_triton.kernels import launch
from seqconv_triton.tools.ahead import stage_inputs
from seqconv_triton.tools.ceilings import GPUS, Ceilings, Gpu
from seqconv_triton.tools.cost import Work, pass_work, total

# Parts of a training step; an evaluation has one.
PARTS = ("forward", "backward")


def module_work(module: nn.Module, images: Sequence[int], dtype: torch.dtype, training: bool) -> dict[str, list[Work]]:
    """The launches of all stages of a module on the meta device by part: eval, or forward and backward."""
    parts: dict[str, list[Work]] = {part: [] for part in (PARTS if training else ("eval",))}
    with torch.no_grad():
        for stage, size in stage_inputs(module, tuple(images)):
            x = torch.empty(size, device="meta", dtype=dtype)
            for part, works in zip(parts, pass_work(stage, x, training), strict=True):
                parts[part] += works
    return parts


def countable(architecture: str) -> bool:
    """Whether machine code can be compiled and counted here: not in Triton's interpreter."""
    return architecture in GPUS and not launch.INTERPRETED


def for_products_of(dtype: torch.dtype, ceilings: Ceilings) -> Ceilings:
    """Those of a GPU are measured in bfloat16; its products of float32 are TF32."""
    return ceilings.in_tf32() if isinstance(ceilings, Gpu) and dtype == torch.float32 else ceilings


def predicted(works: Sequence[Work], ceilings: Ceilings, architecture: str | None = None) -> dict[str, float]:
    """Seconds of FLOPs and of bytes, and the sum over launches of the larger of the two.

    On a GPU of a named architecture also those of the issue slots, and the sum of the largest of all three.
    """
    seconds = {
        "arithmetic_seconds": sum(work.operations for work in works) / ceilings.operations_per_second,
        "bytes_seconds": sum(work.moved for work in works) / ceilings.bytes_per_second,
        "roofline_seconds": math.fsum(ceilings.roofline(work.operations, work.moved) for work in works),
    }
    if architecture is not None and isinstance(ceilings, Gpu):
        counted = total(works, ceilings, architecture)
        seconds |= {"issue_seconds": counted.issue_seconds, "floor_seconds": counted.floor_seconds}
    return seconds


def families(works: Sequence[Work]) -> Iterator[tuple[str, list[Work]]]:
    """The launches by kernel family, most bytes first."""
    names = sorted({w.family for w in works}, key=lambda name: -sum(w.moved for w in works if w.family == name))
    for name in names:
        yield name, [w for w in works if w.family == name]

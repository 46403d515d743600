"""What every launch must move and compute, counted from the plan and the launch itself; nothing runs, no GPU is needed.

Bytes count every operand once a launch, from and to memory: what a cache keeps between launches makes more possible,
not less. Operations are two a multiply-add of the convs' real weights, without the padding of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import seqconv_triton as sct
from bench.ceilings import Ceilings
from seqconv_triton.kernels import launch
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.plan import Plan
from seqconv_triton.tools.ahead import stage_passes

# Parts of a training step; an evaluation has one.
PARTS = ("forward", "backward")


@dataclass(frozen=True)
class Work:
    """One launch: its kernel family, operations and bytes."""

    family: str
    operations: int
    moved: int

    def seconds(self, ceilings: Ceilings) -> float:
        return ceilings.seconds(self.operations, self.moved)


def overlap(plan: Plan, reader: int, start: int, channels: int) -> int:
    """Channels of [start, start + channels) in a group's window."""
    group = plan.groups[reader]
    return max(0, min(start + channels, group.window_start + group.window_width) - max(start, group.window_start))


def work_of(plan: Plan, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Work:
    """Counts of one launch that a stage of this plan makes."""
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    count = {
        "convolution_forward_kernel": convolution,
        "data_gradient_kernel": data_gradient,
        "weight_gradient_kernel": weight_gradient,
        "input_statistics_kernel": statistics,
        "apply_gradient_kernel": elementwise,
        "activate_kernel": elementwise,
    }[kernel.__name__]
    return count(plan, given)


def convolution(plan: Plan, g: dict[str, Any]) -> Work:
    """P, OUT_H and OUT_W are the output's; every channel that is read is read at every pixel of the input."""
    size = g["y_ptr"].element_size()
    images = g["P"] // (g["OUT_H"] * g["OUT_W"])
    area, pixels = g["KERNEL"] ** 2, images * g["H"] * g["W"]
    weights = g["weight_ptr"].numel()
    channels = weights // (area * g["GROUP_OUT"])  # of all conv groups
    channels = min(g["READ"] or channels, channels)
    elements = pixels * channels + weights + g["P"] * g["C_OUT"] * (2 if g["HAS_SHORTCUT"] else 1)
    kind = "tail" if g["STRIDE"] > 1 or g["C_OUT"] != plan.group_width else "1×1" if area == 1 else "3×3"
    return Work(f"convolution {kind}", 2 * g["P"] * weights, elements * size)


def data_gradient(plan: Plan, g: dict[str, Any]) -> Work:
    """P, H and W are the conv input's, where the gradient goes; OUT_H and OUT_W those of the gradient it pulls."""
    size = g["g_ptr"].element_size()
    images = g["P"] // (g["H"] * g["W"])
    behind, area = images * g["OUT_H"] * g["OUT_W"], g["KERNEL"] ** 2
    first, last, rows = g["first_reader"], g["last_reader"], g["ROWS"]
    if g["WINDOWS"]:
        weights = sum(overlap(plan, i, g["target"], g["C"]) for i in range(first, last)) * rows * area
        # Beside dy of all readers but a fresh one, which is made of two operands or more and written.
        fresh = (2 + g["FRESH_UP"] + g["PASSED"]) if g["FRESH"] else 0
        read = (last - first + fresh) * rows * behind
    else:
        # A conv group's outputs see GROUP_IN of the inputs each.
        weights = (last - first) * rows * g["GROUP_IN"] * area
        read = (1 + ((2 + g["FRESH_UP"] + g["PASSED"]) if g["FRESH"] else 0)) * rows * behind
    written = g["C"] * g["P"] * (1 + g["HAS_UPSTREAM"] + g["NORM"])
    kind = (
        ("1×1" if area == 1 else "3×3") if g["WINDOWS"] or (g["STRIDE"] == 1 and g["C"] == plan.group_width) else "tail"
    )
    return Work(f"data gradient {kind}", 2 * behind * weights, (read + weights + written) * size)


def weight_gradient(plan: Plan, g: dict[str, Any]) -> Work:
    """All groups at once; features that several windows share are counted once, partial sums in float32."""
    dy, x, partial, groups = g["dy_ptr"], g["x_ptr"], g["partial_ptr"], g["groups_ptr"].shape[0]
    splits, weights = partial.shape
    images = g["P"] // (g["OUT_H"] * g["OUT_W"])
    pixels = images * g["H"] * g["W"]
    channels = groups * g["ROWS"] if x.dim() == 3 else min(x.shape[1], plan.total_channels)
    elements = groups * g["ROWS"] * g["P"] + channels * pixels
    kind = "tail" if groups == 1 and g["ROWS"] != plan.group_width else "1×1" if g["KERNEL"] == 1 else "3×3"
    return Work(
        f"weight gradient {kind}", 2 * g["P"] * weights, elements * dy.element_size() + 4 * splits * weights
    )  # fmt: skip


def statistics(_: Plan, g: dict[str, Any]) -> Work:
    return Work("statistics", 0, g["P"] * g["CHANNELS"] * g["x_ptr"].element_size())


def elementwise(_: Plan, g: dict[str, Any]) -> Work:
    """Operands in, one tensor out."""
    operands = 2 + ("g_ptr" in g) + g.get("HAS_UPSTREAM", False) + g.get("HAS_PASSED", False)
    return Work("elementwise", 0, operands * g["P"] * g["CHANNELS"] * g["x_ptr"].element_size())


def stage_work(stage: PackedSeqConv, x: Tensor, training: bool) -> list[list[Work]]:
    """The launches of a stage's forward and, in training, its backward; everything on the meta device."""
    passes: list[list[Work]] = []
    for run in stage_passes(stage, x, training):
        found: list[Work] = []

        def note(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], found: list[Work] = found) -> None:
            found.append(work_of(stage.plan, kernel, arguments, constants))

        with launch.listen(note):
            run()
        passes.append(found)
    return passes


def module_work(module: nn.Module, x: Tensor, training: bool) -> dict[str, list[Work]]:
    """The launches of all stages of a module on the meta device by part: eval, or forward and backward."""
    parts: dict[str, list[Work]] = {part: [] for part in (PARTS if training else ("eval",))}

    def note(stage: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        assert isinstance(stage, PackedSeqConv)
        for part, found in zip(parts, stage_work(stage, inputs[0].to(x.dtype), training), strict=True):
            parts[part] += found

    hooks = [m.register_forward_hook(note) for m in module.modules() if isinstance(m, PackedSeqConv)]
    try:
        with torch.no_grad(), sct.use_backend("aten"):
            module.eval()(x.to(next(module.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return parts


def predicted(works: list[Work], ceilings: Ceilings) -> dict[str, float]:
    """Seconds of arithmetic and of bytes, and the sum over launches of the larger of the two."""
    return {
        "arithmetic_seconds": sum(w.operations for w in works) / ceilings.operations_per_second,
        "bytes_seconds": sum(w.moved for w in works) / ceilings.bytes_per_second,
        "roofline_seconds": math.fsum(w.seconds(ceilings) for w in works),
    }


def families(works: list[Work]) -> Iterator[tuple[str, list[Work]]]:
    """The launches by kernel family, most bytes first."""
    names = sorted({w.family for w in works}, key=lambda name: -sum(w.moved for w in works if w.family == name))
    for name in names:
        yield name, [w for w in works if w.family == name]

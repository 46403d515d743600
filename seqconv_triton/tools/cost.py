"""What every launch of a model costs at least on a GPU: bytes, FLOPs and issue slots; nothing runs, no GPU is needed.

Bytes count every operand once a launch, from and to memory: what a cache keeps between launches makes more possible,
not less. FLOPs are two a multiply-add of the convs' real weights. Instructions come from the machine code
(`instructions.py`). A launch takes as long as the largest of the three; the floor of a pass is the sum over launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqconv_triton.kernels import launch
from seqconv_triton.kernels.configs import assume, use_tables
from seqconv_triton.plan import Plan
from seqconv_triton.tools import instructions
from seqconv_triton.tools.ahead import Launch, describe, stage_inputs, stage_passes
from seqconv_triton.tools.ceilings import Gpu

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One launch: its family, FLOPs, bytes, and how it runs; `steps` are the matrix steps of a program by loop."""

    family: str
    operations: int
    moved: int
    programs: int = 0
    tile: tuple[int, int, int] = (0, 0, 0)  # pixels (or rows), channels, reduction: of one matrix step
    steps: tuple[float, ...] = ()
    item: Launch | None = None

    def issue_seconds(self, gpu: Gpu, architecture: str) -> float:
        """All warp instructions of the launch over all issue slots, or over those that its programs reach."""
        if self.item is None or not self.programs:
            return 0.0
        reached = min(1.0, self.programs / gpu.multiprocessors)
        total = self.instructions(architecture) * self.item.num_warps * self.programs
        return total / (gpu.issues_per_second * reached)

    def instructions(self, architecture: str) -> float:
        """Of a warp in one program."""
        if self.item is None:
            return 0.0
        step = 2 * math.prod(self.tile) / self.item.num_warps
        phases = tuple(count * step for count in self.steps)
        return instructions.issued(instructions.of_launch(self.item, architecture), phases)


class Total(NamedTuple):
    """Of some launches: seconds; then warp instructions a program on average, and a matrix step (0 without steps)."""

    launches: int
    bytes_seconds: float
    operations_seconds: float
    issue_seconds: float
    roofline_seconds: float
    floor_seconds: float
    instructions: float
    step_instructions: float


def total(works: Sequence[Work], gpu: Gpu, architecture: str) -> Total:
    """Compiles what was not compiled before; `architecture` is one of `ceilings.GPUS`."""
    instructions.prepare((work.item for work in works if work.item is not None), architecture)
    rooflines = [gpu.roofline(work.operations, work.moved) for work in works]
    issues = [work.issue_seconds(gpu, architecture) for work in works]
    programs = sum(work.programs for work in works)
    issued = sum(work.instructions(architecture) * work.programs for work in works)
    steps = sum(sum(work.steps) * work.programs for work in works)
    return Total(
        len(works), sum(work.moved for work in works) / gpu.bytes_per_second,
        sum(work.operations for work in works) / gpu.operations_per_second, sum(issues), sum(rooflines),
        sum(map(max, rooflines, issues)), issued / max(1, programs), issued / steps if steps else 0.0,
    )  # fmt: skip


def by_kernel(works: Sequence[Work]) -> dict[tuple[str, tuple[int, int, int]], list[Work]]:
    """The launches by family and tile."""
    groups: dict[tuple[str, tuple[int, int, int]], list[Work]] = {}
    for work in works:
        groups.setdefault((work.family, work.tile), []).append(work)
    return groups


def overlap(plan: Plan, reader: int, start: int, channels: int) -> int:
    """Channels of [start, start + channels) in a group's window."""
    group = plan.groups[reader]
    return max(0, min(start + channels, group.window_start + group.window_width) - max(start, group.window_start))


def work_of(plan: Plan, kernel: Any, grid: tuple[int, ...], arguments: Arguments) -> Work:
    """Counts of one launch that a stage of this plan makes; nothing can be compiled of what is interpreted."""
    name = kernel.__name__.removesuffix("_kernel")
    count: Callable[[Plan, Arguments], Work] = COUNTS[name]
    item = None if launch.INTERPRETED else describe(kernel, arguments)
    return replace(count(plan, arguments), programs=math.prod(grid), item=item)


def _steps(channels: int, block: int) -> int:
    return -(-channels // block)


def _tile(a: Arguments) -> tuple[int, int, int]:
    return a["BLOCK_P"], a["BLOCK_N"], a["BLOCK_K"]


def _kind(plan: Plan, kernel: int, stride: int, c_out: int) -> str:
    if stride > 1 or c_out != plan.group_width:
        return "tail"
    return "1×1" if kernel == 1 else "3×3"


def convolution(plan: Plan, a: Arguments) -> Work:
    """Every channel that is read is read at every pixel of the input; the newest ones are also written."""
    size, area = a["x_ptr"].element_size(), a["KERNEL"] ** 2
    images = a["P"] // (a["OUT_H"] * a["OUT_W"])
    pixels, weights = images * a["H"] * a["W"], a["weight_ptr"].numel()
    channels = a["c_in"] * (a["C_OUT"] // a["GROUP_OUT"])
    outputs = sum(a[name] is not None for name in ("raw_ptr", "activated_ptr", "shortcut_ptr"))
    elements = pixels * (channels + a["NEWEST"]) + weights + a["P"] * a["C_OUT"] * outputs
    kind = _kind(plan, a["KERNEL"], a["STRIDE"], a["C_OUT"])
    real = weights if kind != "tail" else math.prod(plan.tail_weight_shape or ())
    if kind == "3×3" and plan.bottleneck:
        real = math.prod(plan.transform_weight_shape) // len(plan.groups)
    steps = (_steps(a["c_in"] - a["NEWEST"], a["BLOCK_K"]) * area,)
    if a["NEWEST"]:
        steps = (*([steps[0]] if steps[0] else []), _steps(a["NEWEST"], a["BLOCK_K"]))
    return Work(f"convolution {kind}", 2 * a["P"] * real, elements * size, tile=_tile(a), steps=steps)


def transposed(plan: Plan, a: Arguments) -> Work:
    """The gradient behind the conv is read at its every pixel, z too where there is a ReLU in front."""
    size, area, weights = a["dy_ptr"].element_size(), a["KERNEL"] ** 2, a["weight_ptr"].numel()
    classes = a["STRIDE"] ** 2
    images = a["g_ptr"].shape[0] // (a["H"] * a["W"])
    behind, pixels = images * a["OUT_H"] * a["OUT_W"], images * a["H"] * a["W"]
    channels = a["C"] // a["GROUP_IN"] * a["GROUP_OUT"]
    elements = behind * channels + weights + pixels * a["C"] * (1 if a["raw_ptr"] is None else 2)
    inside = a["raw_ptr"] is not None
    real = (
        math.prod(plan.transform_weight_shape) // len(plan.groups)
        if inside
        else math.prod(plan.tail_weight_shape or ())
    )
    steps = (_steps(a["GROUP_OUT"], a["BLOCK_K"]) * area / classes,)
    return Work(
        f"transposed {'3×3' if inside else 'tail'}", 2 * behind * real, elements * size, tile=_tile(a), steps=steps
    )  # fmt: skip


def pull(plan: Plan, a: Arguments) -> Work:
    """dz of all readers; that of the newest is made of two operands and written."""
    size, area, rows = a["dz_ptr"].element_size(), a["KERNEL"] ** 2, a["ROWS"]
    first, last, newest = a["first_reader"], a["last_reader"], a["newest_ptr"] is not None
    weights = sum(overlap(plan, i, a["target"], a["C"]) for i in range(first, last)) * rows * area
    read = (last - first + 2 * newest) * rows * a["P"]
    written = a["C"] * a["P"] * (1 + (a["upstream_ptr"] is not None) + (a["raw_ptr"] is not None))
    steps = _steps(rows, a["BLOCK_K"])
    phases = (*([steps] if newest else []), (last - first - newest) * steps * area)
    kind = "1×1" if area == 1 else "3×3"
    return Work(f"pull {kind}", 2 * a["P"] * weights, (read + weights + written) * size, tile=_tile(a), steps=phases)


def weight_gradient(plan: Plan, a: Arguments) -> Work:
    """All groups at once; features that several windows share are counted once, partial sums in float32."""
    dy, x, (splits, weights) = a["dy_ptr"], a["x_ptr"], a["partial_ptr"].shape
    features = x.numel() if x.dim() == 3 else x.shape[0] * min(x.shape[1], plan.total_channels)
    kind = "1×1" if a["KERNEL"] == 1 else "3×3"
    if not a["WINDOWS"] and ((len(dy) == 1 and a["ROWS"] != plan.group_width) or a["STRIDE"] > 1):
        kind = "tail"
    taps = 4 * a["P"] * (a["KERNEL"] > 1)
    moved = (dy.numel() + features) * dy.element_size() + 4 * splits * weights + taps
    return Work(
        f"weight gradient {kind}", 2 * a["P"] * weights, moved, tile=(a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_P"]),
        steps=(_steps(min(a["share"], a["P"]), a["BLOCK_P"]),),
    )  # fmt: skip


def elementwise(_: Plan, a: Arguments) -> Work:
    """Every operand once."""
    names = ("x_ptr", "y_ptr", "copy_ptr", "g_ptr", "upstream_ptr", "passed_ptr", "dx_ptr")
    tensors = [a[name] for name in names if a.get(name) is not None]
    return Work("elementwise", 0, len(tensors) * a["P"] * a["CHANNELS"] * tensors[0].element_size())


def input_statistics(plan: Plan, a: Arguments) -> Work:
    """Copied along the way."""
    return replace(elementwise(plan, a), family="statistics")


def pixel_table(_: Plan, a: Arguments) -> Work:
    return Work("elementwise", 0, 8 * a["P"])


COUNTS: dict[str, Callable[[Plan, Arguments], Work]] = {
    "convolution": convolution,
    "transposed": transposed,
    "pull": pull,
    "weight_gradient": weight_gradient,
    "input_statistics": input_statistics,
    "activate": elementwise,
    "norm_gradient": elementwise,
    "pixel_table": pixel_table,
}


def model_work(model: nn.Module, images: tuple[int, ...], dtype: torch.dtype, training: bool, arch: str) -> list[Work]:
    """The launches of all stages of a model on the meta device: an evaluation, or a training step."""
    works: list[Work] = []
    with assume(arch), use_tables(), torch.no_grad():
        for stage, size in stage_inputs(model, images):
            works += stage_work(stage, torch.empty(size, device="meta", dtype=dtype), training)
    return works


def stage_work(stage: Any, x: Tensor, training: bool) -> list[Work]:
    return [work for part in pass_work(stage, x, training) for work in part]


def pass_work(stage: Any, x: Tensor, training: bool) -> Iterator[list[Work]]:
    """The launches of a stage's forward and, in training, its backward; everything on the meta device."""
    for run in stage_passes(stage, x, training):
        works: list[Work] = []
        with launch.listen(lambda *heard, works=works: works.append(work_of(stage.plan, *heard))):
            run()
        yield works

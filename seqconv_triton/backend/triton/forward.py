"""The launch order of the Triton kernels for a stage's forward pass.

Every value is activated once, and convs read activated channels only. Where the BNs are known a group is two launches, a
1×1 conv over its window and a 3×3 conv, whose epilogues activate. With a batch's statistics it is three: the 1×1 conv
activates the newest channels of its window, those of the group before, and a launch activates z in front of nine taps.
A basic layer has no 1×1 conv: its newest channels are activated by a launch. Raw features are kept for backward; the
activated ones, [P, B], live as long as the pass.
"""

from __future__ import annotations

from torch import Tensor

from seqconv_triton.backend.contract import ForwardOutputs, StageArguments, empty_outputs, with_statistics
from seqconv_triton.backend.packing import group_masks, transform_weights, window_weights
from seqconv_triton.backend.triton.parts import (
    Geometry,
    StageNorms,
    channels_last,
    in_blocks,
    packed,
    repeated,
    rows,
    share_statistics,
    taps_first,
    window_taps_first,
)
from seqconv_triton.kernels.convolution import Newest, convolution
from seqconv_triton.kernels.elementwise import activate
from seqconv_triton.kernels.launch import Scratch
from seqconv_triton.kernels.statistics import input_statistics


class Pass:
    """A forward pass: its operands, the activated channels [P, B], and where raw channels lie."""

    def __init__(self, x: Tensor, shortcut: Tensor | None, stage: StageArguments, outputs: ForwardOutputs) -> None:
        self.stage, self.plan, self.eps = stage, stage.plan, stage.eps
        plan, k = self.plan, self.plan.group_width
        self.geometry = Geometry(plan, x)
        pixels = self.geometry.pixels
        norms = stage.norms if outputs.statistics is None else with_statistics(stage.norms, outputs.statistics)
        self.norms = StageNorms(stage, norms.main, norms.inner)
        self.x = rows(channels_last(x))
        self.activated = x.new_empty((pixels, plan.total_channels))
        self.activated_slots = self.activated[:, plan.in_channels :].split(k, 1)
        self.z = None if outputs.z is None else outputs.z.view(-1, pixels, k)
        self.activated_z = x.new_empty((pixels, k)) if plan.bottleneck else None
        self.masks = None if stage.mask is None else group_masks(stage.mask, plan)
        self.shortcut = None if shortcut is None else rows(channels_last(shortcut))
        self.reduce = () if stage.convs.reduce is None else window_weights(stage.convs.reduce, plan, 1)
        if plan.bottleneck:
            dense = taps_first(in_blocks(stage.convs.transform, self.geometry.inside))
            self.transform = dense.split(k)
        else:
            flat = window_taps_first(stage.convs.transform, plan)
            self.transform = transform_weights(flat.view(stage.convs.transform.shape), plan)
        self.inside = packed(self.geometry.inside)

    def mask(self, j: int) -> Tensor | None:
        return None if self.masks is None else self.masks[j]

    def source(self, j: int, raw: dict[int, Tensor]) -> Tensor | None:
        """What is added to group j's raw output: raw channels [P, k], by their place in the buffer."""
        k, start = self.plan.group_width, self.plan.groups[j].residual_start
        if self.shortcut is not None:
            return self.shortcut[:, j * k : (j + 1) * k]
        if start is None:
            return None
        return self.x[:, start : start + k] if start < self.plan.in_channels else raw[start]

    def leave(self, out: Tensor) -> None:
        """The last activated channels as they are, or through the tail."""
        first = self.plan.total_channels - self.plan.read_channels
        if self.geometry.tail is None or self.plan.tail is None:
            activate(self.activated[:, first:], rows(out), None, self.eps)
            return
        assert self.stage.convs.tail is not None
        source, repeats = self.activated[:, first:], self.plan.tail.repeats
        weight = taps_first(in_blocks(self.stage.convs.tail, self.geometry.tail))
        mask = None if self.masks is None else repeated(self.masks[-1], repeats)
        convolution(repeated(source, repeats), 0, weight, packed(self.geometry.tail), raw=rows(out), mask=mask)


def launch_forward(
    x: Tensor, shortcut: Tensor | None, stage: StageArguments, *, keep: bool, keep_inner: bool
) -> ForwardOutputs:
    """All launches of a forward pass, and what they fill."""
    outputs = empty_outputs(x, stage, keep=keep, keep_inner=keep_inner)
    run = Pass(x, shortcut, stage, outputs)
    buffer = None if outputs.buffer is None else rows(outputs.buffer)
    if stage.statistics == "batch":
        with_batch_statistics(run, buffer)
    else:
        with_known_statistics(run, buffer)
    run.leave(outputs.out)
    return outputs


def with_known_statistics(run: Pass, buffer: Tensor | None) -> None:
    """Epilogues activate; raw channels are stored where they are kept, or where a later shortcut adds them."""
    plan, k, eps, norms = run.plan, run.plan.group_width, run.eps, run.norms
    input_copy = None if buffer is None else buffer[:, : plan.in_channels]
    activate(run.x, run.activated[:, : plan.in_channels], norms.input, eps, input_copy)
    places = [plan.slot(j) for j in range(len(plan.groups))]
    if buffer is None:
        awaited = {group.residual_start for group in plan.groups}
        places = [c for c in places if c in awaited]
        buffer, first = run.x.new_empty((run.geometry.pixels, len(places) * k)), 0
    else:
        first = plan.in_channels
    raw = dict(zip(places, buffer[:, first:].split(k, 1), strict=True)) if places else {}
    for j, group in enumerate(plan.groups):
        source, start, shape, mask = run.activated, group.window_start, run.geometry.windows[j], run.mask(j)
        if run.activated_z is not None:
            z = None if run.z is None else run.z[j]
            convolution(
                source, start, run.reduce[j], shape, raw=z, activated=run.activated_z, norm=norms.inner[j], mask=mask,
                eps=eps,
            )  # fmt: skip
            source, start, shape, mask = run.activated_z, 0, run.inside, None
        convolution(
            source, start, run.transform[j], shape, raw=raw.get(plan.slot(j)), activated=run.activated_slots[j],
            norm=norms.groups[j], mask=mask, shortcut=run.source(j, raw), eps=eps,
        )  # fmt: skip


def with_batch_statistics(run: Pass, buffer: Tensor | None) -> None:
    """A BN is complete when its conv's last program is: its first reader activates."""
    plan, k, eps, norms, ranks = run.plan, run.plan.group_width, run.eps, run.norms, run.stage.ranks
    pixels, channels = run.geometry.pixels, run.plan.in_channels
    if buffer is None:
        buffer = run.x.new_empty((pixels, plan.total_channels))
    scratch = Scratch.allocate(run.x, pixels, max(k, channels))
    slots = buffer[:, channels:].split(k, 1)
    raw = {plan.slot(j): slot for j, slot in enumerate(slots)}
    if norms.input is not None:
        input_statistics(run.x, buffer[:, :channels], norms.input, scratch)
        share_statistics(norms.input, ranks)
        activate(run.x, run.activated[:, :channels], norms.input, eps)
    else:
        activate(run.x, run.activated[:, :channels], None, eps, buffer[:, :channels])
    any_z = None if run.activated_z is None or run.z is not None else run.x.new_empty((pixels, k))
    for j, group in enumerate(plan.groups):
        source, start, shape, mask = run.activated, group.window_start, run.geometry.windows[j], run.mask(j)
        if run.activated_z is not None:
            z = any_z if run.z is None else run.z[j]
            newest = Newest(slots[j - 1], norms.groups[j - 1]) if j > 0 and group.window_width >= k else None
            if j > 0 and newest is None:  # others read more of those channels than this group does
                activate(slots[j - 1], run.activated_slots[j - 1], norms.groups[j - 1], eps)
            convolution(
                source, start, run.reduce[j], shape, raw=z, norm=norms.inner[j], mask=mask, newest=newest,
                scratch=scratch, eps=eps,
            )  # fmt: skip
            share_statistics(norms.inner[j], ranks)
            assert z is not None
            activate(z, run.activated_z, norms.inner[j], eps)
            source, start, shape, mask = run.activated_z, 0, run.inside, None
        elif j > 0:
            activate(slots[j - 1], run.activated_slots[j - 1], norms.groups[j - 1], eps)
        convolution(
            source, start, run.transform[j], shape, raw=slots[j], norm=norms.groups[j], mask=mask,
            shortcut=run.source(j, raw), scratch=scratch, eps=eps,
        )  # fmt: skip
        share_statistics(norms.groups[j], ranks)
    activate(slots[-1], run.activated_slots[-1], norms.groups[-1], eps)

"""The launch order of the Triton kernels for a stage's forward pass.

Every value is activated once, and convs read activated channels only. Where the BNs are known a group is two
launches, a 1×1 conv over its window and a 3×3 conv, whose epilogues activate. With a batch's statistics it is three:
the 1×1 conv activates the newest channels of its window, those of the group before, and a launch activates z in front
of nine taps. A basic layer has no 1×1 conv: its newest channels are activated by a launch. Raw features are kept for
backward; the activated ones, [P, B], live as long as the pass.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from seqconv_triton.backend.contract import ForwardOutputs, StageArguments, empty_outputs, with_statistics
from seqconv_triton.backend.packing import group_masks, transform_weights, window_weights
from seqconv_triton.backend.triton.parts import (
    Geometry,
    StageNorms,
    channels_last,
    check,
    dense,
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
from seqconv_triton.kernels.launch import ConvShape, Scratch
from seqconv_triton.kernels.replay import replayed
from seqconv_triton.kernels.statistics import input_statistics


class Pass:
    """A forward pass: its operands, and all memory that its launches use, so that they can be replayed.

    Activated channels lie in `activated` [P, B]; raw ones in `raw`, by their place in the buffer, where they are kept
    or a later shortcut adds them. What takes a view a group is made when it is asked for: a replay does without.
    """

    def __init__(
        self, x: Tensor, shortcut: Tensor | None, stage: StageArguments, *, keep: bool, keep_inner: bool
    ) -> None:
        self.stage, self.plan, self.eps = stage, stage.plan, stage.eps
        plan, k = self.plan, self.plan.group_width
        self.batch = stage.statistics == "batch"
        self.outputs = empty_outputs(x, stage, keep=keep, keep_inner=keep_inner)
        self.geometry = Geometry(plan, x)
        pixels = self.geometry.pixels
        statistics = self.outputs.statistics
        self.vectors = stage.norms if statistics is None else with_statistics(stage.norms, statistics)
        self.norms = StageNorms(stage, self.vectors.main, self.vectors.inner)
        self.x = rows(channels_last(x))
        self.shortcut = None if shortcut is None else rows(channels_last(shortcut))
        self.mask = None if stage.mask is None else stage.mask.contiguous()
        if plan.bottleneck:
            self.taps_first = taps_first(in_blocks(stage.convs.transform, self.geometry.inside))
        else:
            self.taps_first = window_taps_first(stage.convs.transform, plan)
        self.scratch = Scratch.allocate(x, pixels, max(k, plan.in_channels)) if self.batch else None

        self.activated = x.new_empty((pixels, plan.total_channels))
        if self.outputs.buffer is not None:
            self.buffer = rows(self.outputs.buffer)
        else:  # where a BN's statistics are to come for all channels, else for what shortcuts will add
            raw = plan.total_channels if self.batch else len(plan.awaited_slots) * k
            self.buffer = x.new_empty((pixels, raw))
        self.z = self.activated_z = None
        if plan.bottleneck:
            self.activated_z = x.new_empty((pixels, k))
            if self.outputs.z is not None:
                self.z = self.outputs.z.view(-1, pixels, k)
            elif self.batch:  # one for all groups
                self.z = x.new_empty((1, pixels, k)).expand(len(plan.groups), -1, -1)

    @cached_property
    def raw(self) -> dict[int, Tensor]:
        """The raw outputs that are stored, by their places in the buffer."""
        whole, k = self.outputs.buffer is not None or self.batch, self.plan.group_width
        places = self.plan.slots if whole else self.plan.awaited_slots
        groups = self.buffer[:, self.buffer.shape[1] - len(places) * k :]
        return dict(zip(places, groups.split(k, 1), strict=True)) if places else {}

    @cached_property
    def activated_slots(self) -> tuple[Tensor, ...]:
        return self.activated[:, self.plan.in_channels :].split(self.plan.group_width, 1)

    @cached_property
    def masks(self) -> tuple[Tensor, ...] | None:
        return None if self.mask is None else group_masks(self.mask, self.plan)

    @cached_property
    def inside(self) -> ConvShape:
        return packed(self.geometry.inside)

    @cached_property
    def reduce(self) -> tuple[Tensor, ...]:
        weight = self.stage.convs.reduce
        return () if weight is None else window_weights(weight, self.plan, 1)

    @cached_property
    def transform(self) -> tuple[Tensor, ...]:
        if self.plan.bottleneck:
            return self.taps_first.split(self.plan.group_width)
        return transform_weights(self.taps_first.view(self.stage.convs.transform.shape), self.plan)

    @property
    def memory(self) -> tuple[Any, ...]:
        """All that the groups' launches read or write."""
        convs = self.stage.convs
        own = self.x, self.shortcut, self.mask, convs.reduce, self.taps_first, self.activated, self.buffer
        return (*own, self.z, self.activated_z, self.scratch, self.vectors)

    def source(self, j: int) -> Tensor | None:
        """What is added to group j's raw output [P, k]."""
        k, start = self.plan.group_width, self.plan.groups[j].residual_start
        if self.shortcut is not None:
            return self.shortcut[:, j * k : (j + 1) * k]
        if start is None:
            return None
        return self.x[:, start : start + k] if start < self.plan.in_channels else self.raw[start]

    def leave(self) -> None:
        """The last activated channels as they are, or through the tail."""
        out, first = rows(self.outputs.out), self.plan.total_channels - self.plan.read_channels
        if self.geometry.tail is None or self.plan.tail is None:
            activate(self.activated[:, first:], out, None, self.eps)
            return
        assert self.stage.convs.tail is not None
        source, repeats = self.activated[:, first:], self.plan.tail.repeats
        weight = taps_first(in_blocks(self.stage.convs.tail, self.geometry.tail))
        mask = None if self.mask is None else repeated(self.mask[:, self.plan.window_offsets[-1] :], repeats)
        convolution(repeated(source, repeats), 0, weight, packed(self.geometry.tail), raw=out, mask=mask)


def forward(
    x: Tensor, shortcut: Tensor | None, stage: StageArguments, *, keep: bool, keep_inner: bool
) -> ForwardOutputs:
    """As `contract.ForwardPass` says. Raises TypeError or ValueError for what the kernels do not take."""
    check(x, stage.plan)
    stage = dense(stage)
    run = Pass(x, shortcut, stage, keep=keep, keep_inner=keep_inner)
    groups = with_batch_statistics if run.batch else with_known_statistics
    if stage.ranks is not None:  # which talk between launches
        groups(run)
    else:
        present = shortcut is not None, stage.mask is not None, keep, run.outputs.z is not None
        name = "forward", stage.plan, run.geometry.batch, run.geometry.height, stage.statistics, stage.eps
        replayed((*name, *present), run.memory, lambda: groups(run))
    run.leave()
    return run.outputs


def with_known_statistics(run: Pass) -> None:
    """Epilogues activate."""
    plan, eps, norms, channels = run.plan, run.eps, run.norms, run.plan.in_channels
    kept = run.outputs.buffer is not None
    activate(run.x, run.activated[:, :channels], norms.input, eps, run.buffer[:, :channels] if kept else None)
    for j, group in enumerate(plan.groups):
        source, start, shape = run.activated, group.window_start, run.geometry.windows[j]
        mask = None if run.masks is None else run.masks[j]
        if run.activated_z is not None:
            convolution(
                source, start, run.reduce[j], shape, raw=None if run.z is None else run.z[j],
                activated=run.activated_z, norm=norms.inner[j], mask=mask, eps=eps,
            )  # fmt: skip
            source, start, shape, mask = run.activated_z, 0, run.inside, None
        convolution(
            source, start, run.transform[j], shape, raw=run.raw.get(plan.slot(j)), activated=run.activated_slots[j],
            norm=norms.groups[j], mask=mask, shortcut=run.source(j), eps=eps,
        )  # fmt: skip


def with_batch_statistics(run: Pass) -> None:
    """A BN is complete when its conv's last program is: its first reader activates."""
    plan, k, eps, norms, ranks = run.plan, run.plan.group_width, run.eps, run.norms, run.stage.ranks
    channels, slots, scratch = plan.in_channels, [*run.raw.values()], run.scratch
    assert scratch is not None
    if norms.input is not None:
        input_statistics(run.x, run.buffer[:, :channels], norms.input, scratch)
        share_statistics(norms.input, ranks)
        activate(run.x, run.activated[:, :channels], norms.input, eps)
    else:
        activate(run.x, run.activated[:, :channels], None, eps, run.buffer[:, :channels])
    for j, group in enumerate(plan.groups):
        source, start, shape = run.activated, group.window_start, run.geometry.windows[j]
        mask, newest = None if run.masks is None else run.masks[j], None
        # Other readers of those channels would need what a narrower window does not have.
        if j > 0 and plan.bottleneck and group.window_width >= k:
            newest = Newest(slots[j - 1], norms.groups[j - 1])
        elif j > 0:
            activate(slots[j - 1], run.activated_slots[j - 1], norms.groups[j - 1], eps)
        if run.z is not None and run.activated_z is not None:
            convolution(
                source, start, run.reduce[j], shape, raw=run.z[j], norm=norms.inner[j], mask=mask, newest=newest,
                scratch=scratch, eps=eps,
            )  # fmt: skip
            share_statistics(norms.inner[j], ranks)
            activate(run.z[j], run.activated_z, norms.inner[j], eps)
            source, start, shape, mask = run.activated_z, 0, run.inside, None
        convolution(
            source, start, run.transform[j], shape, raw=slots[j], norm=norms.groups[j], mask=mask,
            shortcut=run.source(j), scratch=scratch, eps=eps,
        )  # fmt: skip
        share_statistics(norms.groups[j], ranks)
    activate(slots[-1], run.activated_slots[-1], norms.groups[-1], eps)

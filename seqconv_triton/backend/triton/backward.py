"""The launch order of the Triton kernels for a stage's backward pass, from the last group to the first.

A group is three launches: a pull gathers the gradient of its channels from all later groups, an elementwise one takes
it through BN, and a transposed conv takes it to z. The gradient of z goes through its BN in the next pull, where one
tap reads it. A basic layer's group is a pull and an elementwise launch. The weight gradients of all groups follow.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend.contract import Gradients, Needs, NormVectors, StageArguments, empty_gradients
from seqconv_triton.backend.packing import group_masks, window_weights
from seqconv_triton.backend.triton.parts import (
    Geometry,
    StageNorms,
    channels_last,
    check,
    dense,
    in_blocks,
    masked_rows,
    mirrored,
    packed,
    padded,
    repeated,
    rows,
    share_gradients,
    window_taps_first,
)
from seqconv_triton.kernels.convolution import convolution
from seqconv_triton.kernels.elementwise import activate, norm_gradient
from seqconv_triton.kernels.launch import NormGradient, Scratch
from seqconv_triton.kernels.pixels import pixel_table
from seqconv_triton.kernels.pull import NewestGradient, pull
from seqconv_triton.kernels.replay import replayed
from seqconv_triton.kernels.transposed import transposed
from seqconv_triton.kernels.weight_gradient import conv_gradient, window_gradient


class Pass:
    """A backward pass: what it reads, and its gradients, some still on their way.

    Beside what it is given it holds, at its peak, dy and dz of all groups (2·J·k channels; J·k in basic layers), two
    groups' g, the tail's gradient and the weights' partial sums.
    """

    def __init__(
        self, d_out: Tensor | None, d_buffer: Tensor | None, buffer: Tensor, z: Tensor | None, stage: StageArguments,
        gradients: Gradients,
    ) -> None:  # fmt: skip
        self.stage, self.plan, self.eps = stage, stage.plan, stage.eps
        self.mask = None if stage.mask is None else stage.mask.contiguous()
        plan, k, count = self.plan, self.plan.group_width, len(self.plan.groups)
        self.batch = stage.statistics == "batch"
        self.gradients = gradients
        self.geometry = Geometry(plan, buffer)
        self.windows = self.geometry.readers()
        pixels = self.geometry.pixels
        self.raw = rows(buffer)
        self.norms = StageNorms(stage, stage.norms.main, stage.norms.inner)
        g = gradients
        inner = None
        if g.reduce_norm_weight is not None and g.reduce_norm_bias is not None:
            inner = NormVectors(g.reduce_norm_weight, g.reduce_norm_bias)
        self.into = StageNorms(stage, NormVectors(g.norm_weight, g.norm_bias), inner)  # of the BNs' affines
        self.d_raw = None if d_buffer is None else rows(channels_last(d_buffer))
        self.z = z.view(count, pixels, k) if z is not None else self.recomputed_z() if plan.bottleneck else None
        self.dy = buffer.new_empty((count, pixels, k))  # of every group's raw output
        self.dz = buffer.new_empty((count, pixels, k)) if plan.bottleneck else self.dy
        self.scratch = Scratch.allocate(buffer, pixels, max(k, plan.in_channels))
        self.table = None if self.geometry.inside.kernel == 1 else pixel_table(self.geometry.inside, buffer)
        first = plan.total_channels - plan.read_channels
        self.upstream = None if d_out is None else self.through_tail(rows(channels_last(d_out)))
        # From the beginning of a slot, or of the input: what is in front of the channels that leave gets no gradient.
        self.first = first - (first - plan.in_channels) % k if first >= plan.in_channels else 0
        if self.upstream is not None and first > self.first:
            self.upstream = F.pad(self.upstream, (first - self.first, 0))
        if d_out is None and g.tail_weight is not None:
            g.tail_weight.zero_()
        self.transposed = packed(self.geometry.inside)
        if plan.bottleneck:
            assert stage.convs.reduce is not None
            self.window_weight = stage.convs.reduce
            self.mirrored = mirrored(in_blocks(stage.convs.transform, self.geometry.inside), self.transposed.group_out)
        else:
            self.window_weight = window_taps_first(stage.convs.transform, plan)
            self.mirrored = self.window_weight
        # Of the group whose turn it is: g behind its activation and behind that of z, and their BNs' a, b, c.
        self.g, self.g_inner = (buffer.new_empty((pixels, k)) for _ in range(2))
        self.coefficients, self.inner_coefficients = self.empty_coefficients(k), self.empty_coefficients(k)

    @cached_property
    def slots(self) -> tuple[Tensor, ...]:
        """Every group's raw output."""
        return self.raw[:, self.plan.in_channels :].split(self.plan.group_width, 1)

    @property
    def memory(self) -> tuple[Any, ...]:
        """All that the groups' launches read or write."""
        g, norms = self.gradients, self.stage.norms
        gradients = g.norm_weight, g.norm_bias, g.reduce_norm_weight, g.reduce_norm_bias
        own = self.raw, self.z, self.dy, self.dz if self.plan.bottleneck else None, self.mask, self.upstream, self.d_raw
        weights = self.window_weight, self.mirrored if self.plan.bottleneck else None, self.windows.table
        groups = self.g, self.g_inner, self.coefficients, self.inner_coefficients
        return own, weights, groups, self.scratch, gradients, norms

    def recomputed_z(self) -> Tensor:
        """z [J, P, k] again, from the raw buffer."""
        plan, geometry = self.plan, self.geometry
        activated = self.raw.new_empty((geometry.pixels, plan.total_channels))
        z = self.raw.new_empty((len(plan.groups), geometry.pixels, plan.group_width))
        memory = self.raw, activated, z, self.mask, self.stage.convs.reduce, self.stage.norms
        name = "z", plan, geometry.batch, geometry.height, self.stage.statistics, self.eps, self.mask is None
        replayed(name, memory, lambda: self._compute_z(activated, z))
        return z

    def _compute_z(self, activated: Tensor, z: Tensor) -> None:
        plan, norms, reduce = self.plan, self.norms, self.stage.convs.reduce
        assert reduce is not None
        activate(self.raw[:, : plan.in_channels], activated[:, : plan.in_channels], norms.input, self.eps)
        behind, _ = norms.behind(plan.in_channels)
        activate(self.raw[:, plan.in_channels :], activated[:, plan.in_channels :], behind, self.eps)
        masks = None if self.mask is None else group_masks(self.mask, plan)
        for j, weight in enumerate(window_weights(reduce, plan, 1)):
            start, mask = plan.groups[j].window_start, None if masks is None else masks[j]
            convolution(activated, start, weight, self.geometry.windows[j], raw=z[j], mask=mask)

    def through_tail(self, d_out: Tensor) -> Tensor:
        """The gradient [P, read] of the activated channels that leave; that of the tail's weight along the way."""
        plan, shape = self.plan, self.geometry.tail
        if plan.tail is None or shape is None:
            return d_out
        assert self.stage.convs.tail is not None
        repeats, first = plan.tail.repeats, plan.total_channels - plan.read_channels
        weight = mirrored(in_blocks(self.stage.convs.tail, shape), packed(shape).group_out)
        upstream = d_out.new_empty((self.geometry.pixels, plan.read_channels * repeats))
        transposed(d_out, weight, packed(shape), upstream)
        mask = None if self.mask is None else self.mask[:, plan.window_offsets[-1] :]
        into = self.gradients.tail_weight
        if into is not None:
            norm, identity = self.norms.behind(first)
            table = None if shape.kernel == shape.stride == 1 else pixel_table(shape, d_out)
            into.copy_(conv_gradient(
                d_out[None], repeated(self.raw[:, first:], repeats)[None], shape, into.numel(),
                norm=padded(norm, identity, repeats), identity=identity, table=table,
                mask=None if mask is None else repeated(mask, repeats), eps=self.eps,
            ).view_as(into))  # fmt: skip
        if repeats > 1:
            upstream = upstream.unflatten(1, (repeats, -1)).sum(1)
        return upstream if mask is None else masked_rows(upstream, mask, self.geometry.height * self.geometry.width)

    def empty_coefficients(self, channels: int) -> Tensor:
        return self.raw.new_empty((3, channels), dtype=self.gradients.norm_weight.dtype)

    def newest(self, j: int) -> NewestGradient:
        """What the transposed conv of group j has left: the gradient of z in front of its BN."""
        assert self.z is not None
        return NewestGradient(self.g_inner, self.z[j], self.inner_coefficients)

    def outside(self, c: int, channels: int) -> Tensor | None:
        """What reaches activated channels from behind the stage."""
        if self.upstream is None or c < self.first:
            return None
        return self.upstream[:, c - self.first : c - self.first + channels]


def backward(
    d_out: Tensor | None,
    d_buffer: Tensor | None,
    buffer: Tensor,
    z: Tensor | None,
    stage: StageArguments,
    needs: Needs,
) -> Gradients:
    """As `contract.BackwardPass` says."""
    check(buffer, stage.plan)
    run = Pass(d_out, d_buffer, buffer, z, dense(stage), empty_gradients(buffer, stage, needs))
    if stage.ranks is not None:  # which talk between launches
        through_groups(run)
    else:
        present = [t is not None for t in (d_out, d_buffer, stage.mask)]
        name = "backward", stage.plan, run.geometry.batch, run.geometry.height, stage.statistics, stage.eps
        replayed((*name, *present), run.memory, lambda: through_groups(run))
    to_input(run, run.newest(0) if stage.plan.bottleneck else None)
    if run.gradients.shortcut is not None:
        geometry = run.geometry
        images = run.dy.unflatten(1, (geometry.batch, geometry.height, geometry.width))
        run.gradients.shortcut.copy_(images.permute(1, 0, 4, 2, 3).flatten(1, 2))
    weight_gradients(run)
    return run.gradients


def through_groups(run: Pass) -> None:
    """dy of all groups, and dz of all but the first, whose g and coefficients are left in front of its BN."""
    plan, k, eps = run.plan, run.plan.group_width, run.eps
    transform = run.mirrored.split(k) if plan.bottleneck else ()
    receivers = {group.residual_start: j for j, group in enumerate(plan.groups) if group.residual_start is not None}
    last = len(plan.groups) - 1
    for j in reversed(range(len(plan.groups))):
        c, norm = plan.slot(j), run.norms.groups[j]
        into = NormGradient(run.into.groups[j].weight, run.into.groups[j].bias, run.coefficients)
        pull(
            run.dz, run.window_weight, run.windows, plan.readers[j + 1], c, run.g,
            newest=run.newest(j + 1) if plan.bottleneck and j < last else None, mask=run.mask,
            upstream=run.outside(c, k), raw=run.slots[j], norm=norm, into=into, scratch=run.scratch, eps=eps,
            batch=run.batch,
        )  # fmt: skip
        if run.batch:
            share_gradients(norm, into, run.stage.ranks, eps)
        passed = run.dy[receivers[c] : receivers[c] + 1] if c in receivers else None
        d_raw = None if run.d_raw is None else run.d_raw[:, c : c + k]
        norm_gradient(run.g, run.slots[j], run.coefficients, run.dy[j], upstream=d_raw, passed=passed)
        if run.z is None:
            continue
        into = NormGradient(run.into.inner[j].weight, run.into.inner[j].bias, run.inner_coefficients)
        transposed(
            run.dy[j], transform[j], run.transposed, run.g_inner, raw=run.z[j], norm=run.norms.inner[j], into=into,
            scratch=run.scratch, eps=eps, batch=run.batch,
        )  # fmt: skip
        if run.batch:
            share_gradients(run.norms.inner[j], into, run.stage.ranks, eps)


def to_input(run: Pass, newest: NewestGradient | None) -> None:
    """The gradient of the stage's input and of its BN; the first group's own dz is complete afterwards."""
    plan, channels = run.plan, run.plan.in_channels
    dx = None if run.gradients.x is None else rows(run.gradients.x)
    if dx is None and run.norms.input is None:
        if newest is not None:
            assert newest.g is not None
            norm_gradient(newest.g, newest.raw, newest.coefficients, run.dz[0])
        return
    g = run.raw.new_empty((run.geometry.pixels, channels)) if dx is None else dx
    raw, into, coefficients = None, None, None
    if run.norms.input is not None and run.into.input is not None:
        raw, coefficients = run.raw[:, :channels], run.empty_coefficients(channels)
        into = NormGradient(run.into.input.weight, run.into.input.bias, coefficients)
    pull(
        run.dz, run.window_weight, run.windows, plan.readers[0], 0, g, newest=newest, mask=run.mask,
        upstream=run.outside(0, channels), raw=raw, norm=run.norms.input, into=into, scratch=run.scratch, eps=run.eps,
        batch=run.batch,
    )  # fmt: skip
    if run.norms.input is not None and into is not None and run.batch:
        share_gradients(run.norms.input, into, run.stage.ranks, run.eps)
    if dx is None:
        return
    # The first block's shortcuts lead here, one group after the other, from channel 0 on.
    receivers = [j for j, group in enumerate(plan.groups) if group.residual_start in range(channels)]
    whole = [plan.groups[j].residual_start for j in receivers] == [*range(0, channels, plan.group_width)]
    passed = run.dy[receivers[0] : receivers[-1] + 1] if whole else None
    d_raw = None if run.d_raw is None else run.d_raw[:, :channels]
    if coefficients is not None or passed is not None or d_raw is not None:
        norm_gradient(g, raw, coefficients, dx, upstream=d_raw, passed=passed)
    for j in () if whole else receivers:
        start = plan.groups[j].residual_start
        assert start is not None
        dx[:, start : start + plan.group_width] += run.dy[j][:, : channels - start]


def weight_gradients(run: Pass) -> None:
    """One launch for all convs over windows, one for all 3×3 convs inside groups."""
    gradients, plan = run.gradients, run.plan
    into = gradients.reduce_weight if plan.bottleneck else gradients.transform_weight
    bits = None if run.table is None else run.table[0]
    if into is not None:  # no name holds a sum in float32 while the next one is taken
        into.copy_(window_gradient(
            run.dz, run.raw, run.windows, into.numel(), norm=run.norms.main, identity=run.norms.identity,
            bits=None if plan.bottleneck else bits, mask=run.mask, eps=run.eps,
        ).view_as(into))  # fmt: skip
    if run.z is not None and gradients.transform_weight is not None and run.norms.all_inner is not None:
        into = gradients.transform_weight
        into.copy_(conv_gradient(
            run.dy, run.z, run.geometry.inside, into.numel(), norm=run.norms.all_inner, table=run.table, eps=run.eps
        ).view_as(into))  # fmt: skip

"""The shared buffer on PyTorch's own ops: CPU first, and wherever Triton is not.

Forward, group by group: 1×1 conv over the window as one matrix product, BN-ReLU, 3×3 conv, shortcut, BN-ReLU into the
ring (`ring.py`). Kept for backward are the raw buffer and z, the raw outputs of the 1×1 convs. Backward walks the
groups in reverse, recomputes activations, and adds each group's gradient onto its window. No more than a window or so
of activated channels and their gradients is held at a time, so that they stay in the cache.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from seqconv_triton.backend.aten import memory
from seqconv_triton.backend.aten.evaluation import evaluate
from seqconv_triton.backend.aten.gradients import FeatureGradients, RawFeatures
from seqconv_triton.backend.aten.output import Output
from seqconv_triton.backend.aten.parts import Groups, Shortcuts, convolution, pixels, pointwise
from seqconv_triton.backend.aten.ring import Features
from seqconv_triton.backend.contract import (
    ForwardOutputs,
    Gradients,
    Needs,
    StageArguments,
    empty_gradients,
    empty_outputs,
    with_statistics,
)
from seqconv_triton.backend.packing import reduce_matrices, transform_weights

aten = torch.ops.aten


def forward(
    x: Tensor, shortcut: Tensor | None, stage: StageArguments, *, keep: bool, keep_inner: bool
) -> ForwardOutputs:
    """A stage's forward pass (`FusedBackend`); what is kept lies in memory that belongs to the stage's weights."""
    owner = stage.norms.main.weight
    if not keep:
        memory.release(owner)
    allocate = partial(memory.empty_strided, owner)
    outputs = empty_outputs(x, stage, keep=keep, keep_inner=keep_inner, empty_strided=allocate)
    if outputs.statistics is not None:
        stage = stage._replace(norms=with_statistics(stage.norms, outputs.statistics))
    elif not keep and x.dtype in (torch.float32, torch.float64):
        # Half precisions keep BN apart: folding would round its scale.
        evaluate(x, shortcut, stage, outputs.out)
        return outputs
    _fill(outputs, x, shortcut, stage)
    return outputs


def _fill(outputs: ForwardOutputs, x: Tensor, shortcut: Tensor | None, stage: StageArguments) -> None:
    plan, k, rows, groups = stage.plan, stage.plan.group_width, pixels(x), Groups(stage, x)
    images, norm, inner = groups.images, groups.norm, groups.inner
    raw = None if outputs.buffer is None else pixels(outputs.buffer)
    if raw is not None:
        raw[:, : plan.in_channels] = rows
    shortcuts = Shortcuts(plan, rows, shortcut)
    leaving = Output(groups.ring, images, stage.convs.tail, groups.masks)
    features = Features(groups.ring, rows)
    normal = pixels(norm.normalize(x, 0)) if plan.raw_input else rows
    for part, into in features.input_pieces():
        torch.clamp_min(normal[:, part], 0, out=into) if plan.raw_input else into.copy_(normal[:, part])
    for j in range(len(plan.groups)):
        c = plan.slot(j)
        leaving.write(c, features, outputs.out)
        window, mask = features.window(j), groups.pixel_mask(j)
        if mask is not None:
            window = window * mask
        if inner is not None:
            z = pointwise(window, groups.placed_reduce(j), None, images)
            if outputs.z is not None:
                outputs.z[j].view(-1, k).copy_(z)
            window = pixels(inner.normalize(images(z), j * k).relu_())
        y = convolution(images(window), groups.placed_transform(j), None, 1, groups.subgroups)
        shortcuts.pass_on(j, y, images)
        if raw is not None:
            raw[:, c : c + k] = pixels(y)
        torch.clamp_min(pixels(norm.normalize(y, c)), 0, out=features.slot(j))
    leaving.write(plan.total_channels, features, outputs.out)


def backward(
    d_out: Tensor | None,
    d_buffer: Tensor | None,
    buffer: Tensor,
    z: Tensor | None,
    stage: StageArguments,
    needs: Needs,
) -> Gradients:
    """A stage's backward pass (`FusedBackend`). Where z was not kept, a group's is computed again in its turn."""
    gradients = empty_gradients(buffer, stage, needs)
    if d_out is None and gradients.tail_weight is not None:
        gradients.tail_weight.zero_()
    plan, k, groups = stage.plan, stage.plan.group_width, Groups(stage, buffer)
    images, norm = groups.images, groups.norm
    raw = RawFeatures(buffer, groups)
    d_raw = None if d_buffer is None else pixels(d_buffer)
    passed: dict[int, Tensor] = {}  # gradients that reach raw channels through shortcuts
    leaving = Output(groups.ring, images, stage.convs.tail, groups.masks)
    features = FeatureGradients(groups, raw)
    features.begin(leaving.gradient(plan.total_channels, features, d_out, gradients.tail_weight))
    through_convs = ThroughConvs(groups, features, z, gradients)
    for j in reversed(range(len(plan.groups))):
        group, c = plan.groups[j], plan.slot(j)
        d_activated = images(features.enter(j))
        dy = norm.backward(d_activated, raw.group(j), c, gradients.norm_weight, gradients.norm_bias)
        if (from_outside := leaving.gradient(c, features, d_out, gradients.tail_weight)) is not None:
            features.add_newest(from_outside)
        if c in passed:
            dy += images(passed.pop(c))
        if d_raw is not None:
            dy += images(d_raw[:, c : c + k])
        if gradients.shortcut is not None:
            gradients.shortcut[:, j * k : (j + 1) * k] = dy
        if group.residual_start is not None:
            passed[group.residual_start] = pixels(dy)
        through_convs(j, dy)

    dx = images(features.input_gradient(in_front_of_relu=plan.raw_input))
    if plan.raw_input:
        # Also where x needs no gradient: its BN's affine belongs to this stage.
        raw_input = raw.images(0, plan.in_channels)
        dx = norm.backward(dx, raw_input, 0, gradients.norm_weight, gradients.norm_bias)
    if gradients.x is not None:
        gradients.x.copy_(dx)
        for c, dy in passed.items():
            gradients.x[:, c : c + k] += images(dy)
        if d_raw is not None:
            gradients.x.add_(images(d_raw[:, : plan.in_channels]))
    return gradients


class ThroughConvs:
    """A group's convs backwards: from the gradient of its raw output to those of its window and of its weights."""

    def __init__(self, groups: Groups, features: FeatureGradients, z: Tensor | None, gradients: Gradients) -> None:
        self.groups, self.features, self.z, self.gradients, plan = groups, features, z, gradients, groups.plan
        self.d_reduce = reduce_matrices(gradients.reduce_weight, plan)
        weight = gradients.transform_weight
        self.d_transform = None if weight is None else transform_weights(weight, plan)

    def __call__(self, j: int, dy: Tensor) -> None:
        groups, inner, k = self.groups, self.groups.inner, self.groups.plan.group_width
        window, mask = self.features.window(j), groups.pixel_mask(j)
        if mask is not None:
            window = window * mask
        if inner is None:
            d_window = pixels(self._transform(j, dy, groups.images(window)))
            self.features.add(j, d_window if mask is None else d_window * mask)
            return
        rows = (
            pointwise(window, groups.placed_reduce(j), None, groups.images) if self.z is None else self.z[j].view(-1, k)
        )
        z = groups.images(rows)
        u = inner.apply(z, j * k).relu_()
        du = self._transform(j, dy, u)
        du = aten.threshold_backward.grad_input(du, u, 0, grad_input=du)
        d_weight, d_bias = self.gradients.reduce_norm_weight, self.gradients.reduce_norm_bias
        assert d_weight is not None and d_bias is not None
        dz = pixels(inner.backward(du, z, j * k, d_weight, d_bias))
        if self.d_reduce:
            self.features.store_product(dz, window, self.d_reduce[j], j)
        if mask is None:
            self.features.add_product(j, dz, groups.reduce[j])
        else:
            self.features.add(j, dz @ groups.placed_reduce(j) * mask)

    def _transform(self, j: int, dy: Tensor, u: Tensor) -> Tensor:
        """The gradient of u, the 3×3 conv's input; stores its weight's."""
        groups, into = self.groups, self.d_transform
        du, dw, _ = aten.convolution_backward(
            dy, u, groups.placed_transform(j), None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups.subgroups,
            [True, into is not None, False],
        )  # fmt: skip
        if into is not None:
            into[j].copy_(dw) if groups.plan.bottleneck else self.features.store(dw, into[j], j)
        return du

"""The aten backend's backward pass.

It walks the groups in reverse, activates the raw buffer again, and adds each group's gradient onto its window. No more
than a window or so of activated channels and their gradients is held at a time, so that they stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqconv_triton.backend.aten.gradients import FeatureGradients, RawFeatures
from seqconv_triton.backend.aten.output import Output
from seqconv_triton.backend.aten.parts import Groups, pixels, pointwise
from seqconv_triton.backend.aten.precision import cast, working_dtype
from seqconv_triton.backend.contract import Gradients, Needs, StageArguments, empty_gradients
from seqconv_triton.backend.packing import reduce_matrices, transform_weights

aten = torch.ops.aten


def backward(
    d_out: Tensor | None,
    d_buffer: Tensor | None,
    buffer: Tensor,
    z: Tensor | None,
    stage: StageArguments,
    needs: Needs,
) -> Gradients:
    """A stage's backward pass. Where z was not kept, a group's is computed again in its turn."""
    if (dtype := working_dtype(buffer)) != buffer.dtype:
        d_out, d_buffer, z = (None if tensor is None else tensor.to(dtype) for tensor in (d_out, d_buffer, z))
        wide = stage._replace(convs=cast(stage.convs, dtype))
        gradients = backward(d_out, d_buffer, buffer.to(dtype), z, wide, needs)
        rounded = (g if g is None else g.to(buffer.dtype) for g in gradients[: len(Needs._fields)])
        return Gradients(*rounded, *gradients[len(Needs._fields) :])  # type: ignore[arg-type] # the BNs' as they are
    gradients = empty_gradients(buffer, stage, needs)
    if d_out is None and gradients.tail_weight is not None:
        gradients.tail_weight.zero_()
    plan, k, groups = stage.plan, stage.plan.group_width, Groups(stage, buffer)
    images, norm = groups.images, groups.norm
    raw = RawFeatures(buffer, groups)
    d_raw = None if d_buffer is None else pixels(d_buffer)
    passed: dict[int, Tensor] = {}  # gradients that reach raw channels through shortcuts
    masks = None if stage.mask is None else groups.ring.place_masks(stage.mask.to(buffer.dtype))
    leaving = Output(groups.ring, images, stage.convs.tail, masks)
    features = FeatureGradients(groups, raw)
    features.begin(leaving.gradient(plan.total_channels, features, d_out, gradients.tail_weight))
    through_convs = ThroughConvs(groups, features, z, gradients)
    for j in reversed(range(len(plan.groups))):
        group, c = plan.groups[j], plan.slot(j)
        d_activated = images(features.enter(j))
        dy = norm.backward(d_activated, raw.group(j), c)
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
        through_convs(j, dy, None if masks is None else images.pixel_mask(masks[j]))

    dx = images(features.input_gradient(in_front_of_relu=plan.raw_input))
    if plan.raw_input:
        # Also where x needs no gradient: its BN's affine belongs to this stage.
        raw_input = raw.images(0, plan.in_channels)
        dx = norm.backward(dx, raw_input, 0)
    norm.store_gradients(gradients.norm_weight, gradients.norm_bias)
    if groups.inner is not None:
        assert gradients.reduce_norm_weight is not None and gradients.reduce_norm_bias is not None
        groups.inner.store_gradients(gradients.reduce_norm_weight, gradients.reduce_norm_bias)
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

    def __call__(self, j: int, dy: Tensor, mask: Tensor | None) -> None:
        """`mask`: group j's dropout mask for every pixel of what it reads."""
        groups, inner, k = self.groups, self.groups.inner, self.groups.plan.group_width
        window = self.features.window(j)
        if mask is not None:
            window = window * mask
        if inner is None:
            d_window = pixels(self._transform(j, dy, groups.images(window)))
            self.features.add(j, d_window if mask is None else d_window * mask)
            return
        if self.z is not None:
            z = groups.images(self.z[j].view(-1, k))
        else:
            z = groups.images(pointwise(window, groups.placed_reduce(j), None, groups.images))
        u = inner.apply(z, j * k).relu_()
        du = self._transform(j, dy, u)
        du = aten.threshold_backward.grad_input(du, u, 0, grad_input=du)
        dz = pixels(inner.backward(du, z, j * k))
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

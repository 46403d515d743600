"""What the Triton backend's backward pass does before and after its loop over the groups."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from seqconv_triton.backend.contract import Convs, Gradients
from seqconv_triton.backend.packing import group_masks, window_weights
from seqconv_triton.backend.triton.parts import Geometry, Norms, rows, taps_last_
from seqconv_triton.kernels.convolution import convolution
from seqconv_triton.kernels.data_gradient import Fresh, data_gradient
from seqconv_triton.kernels.elementwise import apply_gradient
from seqconv_triton.kernels.launch import SCALE, SHIFT, Features
from seqconv_triton.kernels.weight_gradient import weight_gradient
from seqconv_triton.plan import Plan


def recompute_z(
    raw: Tensor, convs: Convs, norms: Norms, mask: Tensor | None, plan: Plan, eps: float, geometry: Geometry
) -> Tensor:  # fmt: skip
    """z [J, P, k] again, from the raw buffer."""
    assert convs.reduce is not None
    weights = window_weights(convs.reduce, plan, 1)
    source = Features(raw, norms.main[SCALE], norms.main[SHIFT], norms.offset)
    masks = None if mask is None else group_masks(mask, plan)
    z = raw.new_empty((len(plan.groups), raw.shape[0], plan.group_width))
    for j, group in enumerate(plan.groups):
        own_mask = None if masks is None else masks[j]
        convolution(source, group.window_start, weights[j], geometry.windows[j], z[j], mask=own_mask, eps=eps)
    return z


def through_tail(
    d_tail: Tensor,
    raw: Tensor,
    convs: Convs,
    norms: Norms,
    mask: Tensor | None,
    plan: Plan,
    eps: float,
    geometry: Geometry,
    gradients: Gradients,
) -> Tensor:
    """The gradient [P, read] of the activated channels that the tail reads; that of its weight along the way."""
    assert convs.tail is not None and geometry.tail is not None
    table = geometry.tables[2]
    weight = convs.tail.permute(0, 2, 3, 1).contiguous()
    upstream = raw.new_empty((raw.shape[0], plan.read_channels))
    count = len(table.rows)
    data_gradient(
        d_tail.expand(count, -1, -1), weight, geometry.tail, table, (0, count), 0, plan.read_channels, upstream, eps,
        windows=False, mask=mask,
    )  # fmt: skip
    into = gradients.tail_weight
    if into is not None:
        first = plan.total_channels - plan.read_channels
        ends = Features(
            raw[:, first:], norms.main[SCALE, first:], norms.main[SHIFT, first:], max(0, norms.offset - first)
        )
        flat = weight_gradient(
            d_tail[None],
            ends,
            geometry.tail,
            table._replace(rows=table.rows[:1]),
            geometry.tail.total_in,
            False,
            weight.numel(),
            mask=mask,
        )
        taps_last_(into, flat, plan, windows=False)
    return upstream


def to_input(
    pull: Callable[[int, tuple[int, int], Tensor, Fresh | None, Tensor | None, Tensor | None], None],
    fresh: Fresh | None,
    dy: Tensor,
    dz: Tensor,
    raw: Tensor,
    d_raw: Tensor | None,
    norms: Norms,
    receivers: dict[int, int],
    plan: Plan,
    gradients: Gradients,
) -> None:
    """The gradient of the stage's input and of its BN; the first group's own gradient is complete afterwards."""
    k, width = plan.group_width, plan.in_channels
    dx = None if gradients.x is None else rows(gradients.x)
    if dx is None and not plan.raw_input:
        assert fresh is not None
        apply_gradient(fresh.g, fresh.raw, fresh.norm, dz[0], fresh.upstream, fresh.passed)
        return
    d_own = None if d_raw is None else d_raw[:, :width]
    if dx is None:
        dx = raw.new_empty((raw.shape[0], width))
    own = (raw[:, :width], norms.main[:, :width]) if plan.raw_input else (None, None)
    pull(0, plan.readers[0], dx, fresh, *own)
    if gradients.x is None:
        return
    if plan.raw_input:
        apply_gradient(dx, raw[:, :width], norms.main[:, :width], dx, d_own)
    elif d_own is not None:
        dx += d_own
    passed = [receivers[c] for c in range(0, width, k) if c in receivers]
    if passed:  # the first block's shortcuts: one group after the other, from channel 0 on
        dx.unflatten(1, (-1, k))[:, : len(passed)] += dy[passed[0] : passed[-1] + 1].transpose(0, 1)


def weight_gradients(
    dy: Tensor,
    dz: Tensor,
    raw: Tensor,
    z_rows: Tensor | None,
    norms: Norms,
    mask: Tensor | None,
    plan: Plan,
    geometry: Geometry,
    gradients: Gradients,
) -> None:
    """One launch for all convs over windows, one for all 3×3 convs inside groups."""
    windows, inside, _ = geometry.tables
    wanted = gradients
    into = wanted.reduce_weight if plan.bottleneck else wanted.transform_weight
    if into is not None:
        widest = max(group.window_width for group in plan.groups)
        shape = max(geometry.windows, key=lambda shape: shape.group_in)
        source = Features(raw, norms.main[SCALE], norms.main[SHIFT], norms.offset)
        flat = weight_gradient(dz, source, shape, windows, widest, True, into.numel(), mask=mask)
        if plan.bottleneck:
            into.copy_(flat.view_as(into))
        else:
            taps_last_(into, flat, plan, windows=True)
    if z_rows is not None and wanted.transform_weight is not None:
        assert norms.inner is not None
        source = Features(z_rows, norms.inner[SCALE], norms.inner[SHIFT])
        flat = weight_gradient(
            dy, source, geometry.inside, inside, plan.group_width, False, wanted.transform_weight.numel(),
            own_source=True,
        )  # fmt: skip
        taps_last_(wanted.transform_weight, flat, plan, windows=False)

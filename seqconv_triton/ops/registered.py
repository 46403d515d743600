"""The registered ops: one functional op for a stage and one for its backward; a layer is a stage of one layer.

The buffer is born inside the op and leaves it as an output; nothing is mutated and nothing aliases, so that
torch.compile finds one opaque node a stage. `functional.stage` is what calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqconv_triton.backend.aten import memory as aten_memory
from seqconv_triton.backend.aten import training as aten
from seqconv_triton.backend.contract import StageGradients, StageParameters, Statistics, WantedGradients
from seqconv_triton.backend.packing import empty_channels_last, statistics_dtype
from seqconv_triton.backend.ranks import AcrossRanks, process_group
from seqconv_triton.plan import Plan
from seqconv_triton.plan_text import decode


def implementation(name: str) -> Any:
    """The module of a fused backend; Triton is imported only when it is asked for."""
    if name == "triton":
        from seqconv_triton.backend.triton import forward as triton

        return triton
    return aten


PARAMETERS = len(StageParameters._fields)


def profiled(what: str, plan: Plan) -> AbstractContextManager[Any]:
    """A range that profilers show: `stage_forward 256→512 k64 J36`."""
    text = f"{what} {plan.in_channels}→{plan.out_channels} k{plan.group_width} J{len(plan.groups)}"
    return torch.profiler.record_function(text)


def _allocate_forward(
    x: Tensor,
    plan: Plan,
    batch_statistics: bool,
    keep: bool,
    keep_inner: bool,
    group: str,
    empty_strided: Callable[..., Tensor] = Tensor.new_empty_strided,
) -> list[Tensor]:
    """out, buffer, z, four statistics and the ranks' counts, uninitialised; what is not kept has no elements.

    `empty_strided` gives the memory for what is kept.
    """
    images, _, height, width = x.shape
    groups, k = len(plan.groups), plan.group_width
    out = empty_channels_last(x, plan.out_channels, plan.out_size(height), plan.out_size(width))
    buffer, z = x.new_empty(0), x.new_empty(0)
    if keep:
        buffer = empty_channels_last(x, plan.total_channels, height, width, empty_strided)
    if keep_inner and plan.bottleneck:
        strides = (images * height * width * k, height * width * k, width * k, k, 1)
        z = empty_strided(x, (groups, images, height, width, k), strides)
    precise = statistics_dtype(x.dtype)
    sizes = [plan.normalized_channels] * 2 + [groups * k if plan.bottleneck else 0] * 2
    statistics = [x.new_empty(size if batch_statistics else 0, dtype=precise) for size in sizes]
    ranks = process_group(group).size() if group and batch_statistics else 0
    return [out, buffer, z, *statistics, x.new_empty(ranks, dtype=torch.float64)]


@torch.library.custom_op("seqconv_triton::stage_forward", mutates_args=())
def stage_forward(
    x: Tensor,
    shortcut: Tensor | None,
    reduce_weight: Tensor | None,
    reduce_norm_weight: Tensor | None,
    reduce_norm_bias: Tensor | None,
    transform_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    tail_weight: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    reduce_mean: Tensor | None,
    reduce_var: Tensor | None,
    mask: Tensor | None,
    plan: str,
    eps: float,
    batch_statistics: bool,
    keep: bool,
    keep_inner: bool,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    decoded = decode(plan)
    if not keep:
        aten_memory.release(norm_weight)
    out, buffer, z, *batch, counts = _allocate_forward(
        x, decoded, batch_statistics, keep, keep_inner, group, partial(aten_memory.empty_strided, norm_weight)
    )
    parameters = StageParameters(
        reduce_weight, reduce_norm_weight, reduce_norm_bias, transform_weight, norm_weight, norm_bias, tail_weight
    )
    statistics = Statistics(*batch) if batch_statistics else Statistics(mean, var, reduce_mean, reduce_var)
    if x.numel():
        # Triton launches on the current device.
        with torch.cuda.device_of(x), profiled("stage_forward", decoded):
            across = None
            if group and batch_statistics:
                across = AcrossRanks.meet(group, x)
                counts.copy_(across.counts)
            implementation(backend).stage_forward(
                x, shortcut, parameters, statistics, batch_statistics, mask, decoded, eps,
                out, buffer if keep else None, z if keep_inner and decoded.bottleneck else None, across,
            )  # fmt: skip
    return out, buffer, z, *batch, counts  # type: ignore[return-value]


@stage_forward.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    plan, _, batch_statistics, keep, keep_inner, group, _ = arguments[-7:]
    return tuple(_allocate_forward(x, decode(plan), batch_statistics, keep, keep_inner, group))


def _allocate_backward(
    buffer: Tensor, parameters: StageParameters, plan: Plan, has_shortcut: bool, needs: list[bool]
) -> list[Tensor]:
    """Gradients of x, shortcut and every parameter; what is not needed has no elements."""
    _, _, height, width = buffer.shape
    gradients = [buffer.new_empty(0), buffer.new_empty(0)]
    if needs[0]:
        gradients[0] = empty_channels_last(buffer, plan.in_channels, height, width)
    if needs[1] and has_shortcut:
        gradients[1] = empty_channels_last(buffer, len(plan.groups) * plan.group_width, height, width)
    for name, parameter, needed in zip(parameters._fields, parameters, needs[2:], strict=True):
        wanted = parameter is not None and (needed or "norm" in name)
        gradients.append(torch.empty_like(parameter) if wanted else buffer.new_empty(0))  # type: ignore[arg-type]
    return gradients


@torch.library.custom_op("seqconv_triton::stage_backward", mutates_args=())
def stage_backward(
    d_out: Tensor | None,
    d_buffer: Tensor | None,
    buffer: Tensor,
    z: Tensor,
    reduce_weight: Tensor | None,
    reduce_norm_weight: Tensor | None,
    reduce_norm_bias: Tensor | None,
    transform_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    tail_weight: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    reduce_mean: Tensor | None,
    reduce_var: Tensor | None,
    mask: Tensor | None,
    counts: Tensor,
    plan: str,
    eps: float,
    batch_statistics: bool,
    has_shortcut: bool,
    group: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    decoded = decode(plan)
    parameters = StageParameters(
        reduce_weight, reduce_norm_weight, reduce_norm_bias, transform_weight, norm_weight, norm_bias, tail_weight
    )
    gradients = _allocate_backward(buffer, parameters, decoded, has_shortcut, needs)
    if buffer.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return tuple(gradients)  # type: ignore[return-value]
    wanted = [None if g.numel() == 0 else g for g in gradients]
    across = AcrossRanks(process_group(group), counts) if group and batch_statistics else None
    with torch.cuda.device_of(buffer), profiled("stage_backward", decoded):
        implementation(backend).stage_backward(
            d_out, d_buffer, buffer, z if z.numel() else None, parameters,
            Statistics(mean, var, reduce_mean, reduce_var), batch_statistics, mask, decoded, eps,
            StageGradients(wanted[0], wanted[1], WantedGradients(*wanted[2:])), across,  # type: ignore[arg-type]
        )  # fmt: skip
    return tuple(gradients)  # type: ignore[return-value]


@stage_backward.register_fake
def _(d_out: Tensor | None, d_buffer: Tensor | None, buffer: Tensor, z: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    plan, _, _, has_shortcut, _, needs, _ = arguments[-7:]
    parameters = StageParameters(*arguments[:PARAMETERS])
    return tuple(_allocate_backward(buffer, parameters, decode(plan), has_shortcut, needs))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, shortcut, *rest = inputs
    parameters, running, (mask, *scalars) = rest[:PARAMETERS], rest[PARAMETERS : PARAMETERS + 4], rest[PARAMETERS + 4 :]
    plan, eps, batch_statistics, keep, _, group, backend = scalars
    _, buffer, z, *batch, counts = output
    if not keep:  # inside vmap nothing says that it requires a gradient
        raise NotImplementedError(
            "gradients do not pass seqconv_triton's fused ops inside torch.func.vmap; compute under "
            '`with seqconv_triton.use_backend("reference"):`'
        )
    statistics = batch if batch_statistics else running
    ctx.save_for_backward(buffer, z, *parameters, *statistics, mask, counts)
    ctx.scalars = plan, eps, batch_statistics, shortcut is not None, group
    ctx.backend = backend
    ctx.mark_non_differentiable(z, *batch, counts)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_buffer: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_out is None and d_buffer is None:
        return (None,) * len(ctx.needs_input_grad)
    needs = list(ctx.needs_input_grad[: 2 + PARAMETERS])
    gradients = torch.ops.seqconv_triton.stage_backward(
        d_out, d_buffer, *ctx.saved_tensors, *ctx.scalars, needs, ctx.backend
    )
    given = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    return (*given, *(None,) * 12)


def _no_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "seqconv_triton's fused backward is not differentiable again; for second derivatives compute the forward pass "
        'under `with seqconv_triton.use_backend("reference"):`'
    )


stage_forward.register_autograd(_backward, setup_context=_save)
stage_backward.register_autograd(_no_double_backward)

"""The registered ops: one functional op for a stage and one for its backward; a layer is a stage of one layer.

The buffer is born inside the op and leaves it as an output; nothing is mutated and nothing aliases, so that
torch.compile finds one opaque node a stage. `stage` is the public function: it checks, casts under autocast, and
sends the reference backend's work to plain PyTorch instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from seqconv_triton.autocast import autocast_dtype, no_autocast
from seqconv_triton.backend import (
    StageGradients,
    StageOutput,
    StageParameters,
    Statistics,
    WantedGradients,
    aten,
    backend_for,
    reference,
)
from seqconv_triton.backend.packing import empty_channels_last, statistics_dtype
from seqconv_triton.checks import check_images, check_stage
from seqconv_triton.plan import Plan


def implementation(name: str) -> Any:
    """The module of a fused backend; Triton is imported only when it is asked for."""
    if name == "triton":
        from seqconv_triton.backend import triton

        return triton
    return aten


PARAMETERS = len(StageParameters._fields)


def stage(
    x: Tensor,
    parameters: StageParameters,
    plan: Plan,
    *,
    statistics: Statistics | None = None,
    shortcut: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    keep_buffer: bool = False,
) -> StageOutput:
    """A whole stage, or a single layer.

    x [N, C, H, W] is raw if plan.raw_input, else activated. Without `statistics` every BN uses the batch's, which the
    output then holds; with them BN is folded. `shortcut` [N, J·k, H, W] is added to a single layer's raw output,
    `mask` [N, plan.mask_channels] multiplies the channels that each group, and the tail, sees. `keep_buffer` also
    returns the raw features [N, plan.total_channels, H, W]: the input and every group's.

    Under autocast x, shortcut and conv weights are cast; BN parameters and statistics stay float32.
    Raises TypeError or ValueError for what does not fit together.
    """
    check_images("x", x, plan.in_channels)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        shortcut = None if shortcut is None else shortcut.to(dtype)
        parameters = _cast(parameters, dtype, lambda name: "norm" not in name)
    check_stage(x, parameters, plan, statistics, shortcut, mask)
    precise = statistics_dtype(x.dtype)
    parameters = _cast(parameters, precise, lambda name: "norm" in name)
    if statistics is not None:
        statistics = _cast(statistics, precise, lambda name: True)

    backend = backend_for(x)
    with no_autocast(x):
        if backend == "reference":
            return reference.stage(x, shortcut, parameters, statistics, mask, plan, eps, keep_buffer)
        _refuse_transforms()
        differentiable = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, shortcut, *parameters)
        )
        out, buffer, _, *batch = torch.ops.seqconv_triton.stage_forward(
            x, shortcut, *parameters, *(statistics or (None,) * 4), mask,
            plan.encode(), eps, statistics is None, keep_buffer or differentiable, backend,
        )  # fmt: skip
    taken = None
    if statistics is None:
        taken = Statistics(*(batch if plan.bottleneck else (*batch[:2], None, None)))
    return StageOutput(out, buffer if keep_buffer else None, taken)


def _refuse_transforms() -> None:
    """PyTorch would drop forward-mode tangents silently, and functorch names no way out."""
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    interpreter = functorch.peek_interpreter_stack()
    transformed = interpreter is not None and interpreter.key() in (
        functorch.TransformType.Grad,
        functorch.TransformType.Jvp,
    )
    if transformed or torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(
            "forward-mode derivatives and torch.func's grad, vjp and jvp do not pass seqconv_triton's fused ops; "
            'compute under `with seqconv_triton.use_backend("reference"):`'
        )


Packed = TypeVar("Packed", StageParameters, Statistics)


def _cast(packed: Packed, dtype: torch.dtype, chosen: Callable[[str], bool]) -> Packed:
    fields = zip(packed._fields, packed, strict=True)
    return type(packed)(*(t.to(dtype) if t is not None and chosen(name) else t for name, t in fields))  # type: ignore[arg-type]


def _allocate_forward(x: Tensor, plan: Plan, batch_statistics: bool, keep: bool) -> list[Tensor]:
    """out, buffer, z and four statistics, uninitialised; what is not kept has no elements."""
    images, _, height, width = x.shape
    groups, k = len(plan.groups), plan.group_width
    out = empty_channels_last(x, plan.out_channels, plan.out_size(height), plan.out_size(width))
    buffer = empty_channels_last(x, plan.total_channels, height, width) if keep else x.new_empty(0)
    z = x.new_empty((groups, images, height, width, k)) if keep and plan.bottleneck else x.new_empty(0)
    precise = statistics_dtype(x.dtype)
    sizes = [plan.normalized_channels] * 2 + [groups * k if plan.bottleneck else 0] * 2
    return [out, buffer, z, *(x.new_empty(size if batch_statistics else 0, dtype=precise) for size in sizes)]


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    decoded = Plan.decode(plan)
    out, buffer, z, *batch = _allocate_forward(x, decoded, batch_statistics, keep)
    parameters = StageParameters(
        reduce_weight, reduce_norm_weight, reduce_norm_bias, transform_weight, norm_weight, norm_bias, tail_weight
    )
    statistics = Statistics(*batch) if batch_statistics else Statistics(mean, var, reduce_mean, reduce_var)  # type: ignore[arg-type]
    if x.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            implementation(backend).stage_forward(
                x, shortcut, parameters, statistics, batch_statistics, mask, decoded, eps,
                out, buffer if keep else None, z if keep and decoded.bottleneck else None,
            )  # fmt: skip
    return out, buffer, z, *batch  # type: ignore[return-value]


@stage_forward.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    plan, _, batch_statistics, keep, _ = arguments[-5:]
    return tuple(_allocate_forward(x, Plan.decode(plan), batch_statistics, keep))


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
    mean: Tensor,
    var: Tensor,
    reduce_mean: Tensor | None,
    reduce_var: Tensor | None,
    mask: Tensor | None,
    plan: str,
    eps: float,
    batch_statistics: bool,
    has_shortcut: bool,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    decoded = Plan.decode(plan)
    parameters = StageParameters(
        reduce_weight, reduce_norm_weight, reduce_norm_bias, transform_weight, norm_weight, norm_bias, tail_weight
    )
    gradients = _allocate_backward(buffer, parameters, decoded, has_shortcut, needs)
    if buffer.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return tuple(gradients)  # type: ignore[return-value]
    wanted = [None if g.numel() == 0 else g for g in gradients]
    with torch.cuda.device_of(buffer):
        implementation(backend).stage_backward(
            d_out, d_buffer, buffer, z if decoded.bottleneck else None, parameters,
            Statistics(mean, var, reduce_mean, reduce_var), batch_statistics, mask, decoded, eps,
            StageGradients(wanted[0], wanted[1], WantedGradients(*wanted[2:])),  # type: ignore[arg-type]
        )  # fmt: skip
    return tuple(gradients)  # type: ignore[return-value]


@stage_backward.register_fake
def _(d_out: Tensor | None, d_buffer: Tensor | None, buffer: Tensor, z: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    plan, _, _, has_shortcut, needs, _ = arguments[-6:]
    parameters = StageParameters(*arguments[:PARAMETERS])
    return tuple(_allocate_backward(buffer, parameters, Plan.decode(plan), has_shortcut, needs))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, shortcut, *rest = inputs
    parameters, running, (mask, *scalars) = rest[:PARAMETERS], rest[PARAMETERS : PARAMETERS + 4], rest[PARAMETERS + 4 :]
    plan, eps, batch_statistics, keep, backend = scalars
    _, buffer, z, *batch = output
    assert keep, "stage_forward keeps no buffer, so that it has no backward"
    statistics = batch if batch_statistics else running
    ctx.save_for_backward(buffer, z, *parameters, *statistics, mask)
    ctx.scalars = plan, eps, batch_statistics, shortcut is not None
    ctx.backend = backend
    ctx.mark_non_differentiable(z, *batch)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_buffer: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_out is None and d_buffer is None:
        return (None,) * len(ctx.needs_input_grad)
    needs = list(ctx.needs_input_grad[: 2 + PARAMETERS])
    gradients = torch.ops.seqconv_triton.stage_backward(
        d_out, d_buffer, *ctx.saved_tensors, *ctx.scalars, needs, ctx.backend
    )
    given = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    return (*given, *(None,) * 10)


def _no_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "seqconv_triton's fused backward is not differentiable again; for second derivatives compute the forward pass "
        'under `with seqconv_triton.use_backend("reference"):`'
    )


stage_forward.register_autograd(_backward, setup_context=_save)
stage_backward.register_autograd(_no_double_backward)

"""The registered ops: one functional op for a stage and one for its backward; a layer is a stage of one layer.

The buffer is born inside the op and leaves it as an output; nothing is mutated and nothing aliases, so that
torch.compile finds one opaque node a stage. An op's arguments are flat: `flatten` and `unflatten` turn a stage into
them and back, by the names of the schema. `stage.py` is what calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqconv_triton.backend.aten.backward import backward as aten_backward
from seqconv_triton.backend.aten.forward import forward as aten_forward
from seqconv_triton.backend.contract import (
    BatchStatistics,
    Convs,
    ForwardOutputs,
    FusedBackend,
    Gradients,
    Needs,
    Norms,
    NormVectors,
    StageArguments,
    empty_gradients,
    empty_outputs,
)
from seqconv_triton.backend.ranks import AcrossRanks, process_group
from seqconv_triton.plan import Plan
from seqconv_triton.plan_text import decode, encode


def implementation(name: str, x: Tensor) -> FusedBackend:
    """A fused backend for tensors like x; Triton is imported only when it is asked for."""
    if name == "triton" and not left_to_pytorch(x):
        from seqconv_triton.backend.triton.backward import backward
        from seqconv_triton.backend.triton.forward import forward

        return FusedBackend(forward, backward)
    return FusedBackend(aten_forward, aten_backward)


def left_to_pytorch(x: Tensor) -> bool:
    """Float32 on a GPU where PyTorch's convolutions must not use TF32: no matrix instruction multiplies exactly."""
    from seqconv_triton.kernels.launch import precision

    return x.is_cuda and x.dtype == torch.float32 and precision(x.dtype) != "tf32"


# What both directions take; `mean` and `var` in the backward pass are the batch's where the forward pass took those.
TENSORS = (
    "Tensor? reduce_weight, Tensor transform_weight, Tensor? tail_weight, "
    "Tensor norm_weight, Tensor norm_bias, Tensor? norm_mean, Tensor? norm_var, "
    "Tensor? reduce_norm_weight, Tensor? reduce_norm_bias, Tensor? reduce_norm_mean, Tensor? reduce_norm_var, "
    "Tensor? mask"
)
CONSTANTS = "str plan, str statistics, float eps, str group, str backend"


def _names(schema: str) -> tuple[str, ...]:
    return tuple(argument.split()[1] for argument in schema.split(", "))


TENSOR_NAMES, CONSTANT_NAMES = _names(TENSORS), _names(CONSTANTS)
FORWARD_NAMES = ("x", "shortcut", *TENSOR_NAMES, *CONSTANT_NAMES, "keep", "keep_inner")
BACKWARD_NAMES = ("d_out", "d_buffer", "buffer", "z", *TENSOR_NAMES, "counts", *CONSTANT_NAMES, "needs")


class FlatOutputs(NamedTuple):
    """What the forward op returns; what is not there has no elements. `counts`: every rank's number of pixels."""

    out: Tensor
    buffer: Tensor
    z: Tensor
    norm_mean: Tensor
    norm_var: Tensor
    reduce_norm_mean: Tensor
    reduce_norm_var: Tensor
    counts: Tensor  # float64 [ranks]


def named(names: Sequence[str], arguments: Sequence[Any]) -> dict[str, Any]:
    """An op's flat arguments by the names of its schema."""
    return dict(zip(names, arguments, strict=True))


def flatten(stage: StageArguments, group: str, backend: str) -> dict[str, Any]:
    """A stage as the flat arguments that both ops take."""
    convs, (main, inner) = stage.convs, stage.norms
    inner_vectors = (None,) * 4 if inner is None else inner
    constants = encode(stage.plan), stage.statistics, stage.eps, group, backend
    values = (*convs, *main, *inner_vectors, stage.mask, *constants)
    return named(TENSOR_NAMES + CONSTANT_NAMES, values)


def unflatten(call: dict[str, Any]) -> StageArguments:
    """The inverse of `flatten`."""
    convs = Convs(call["reduce_weight"], call["transform_weight"], call["tail_weight"])
    main, inner = (
        NormVectors(*(call[f"{norm}_{vector}"] for vector in NormVectors._fields)) for norm in ("norm", "reduce_norm")
    )
    norms = Norms(main, None if call["reduce_norm_weight"] is None else inner)
    return StageArguments(decode(call["plan"]), convs, norms, call["statistics"], call["eps"], call["mask"])


def run_stage(
    x: Tensor, shortcut: Tensor | None, stage: StageArguments, keep: bool, keep_inner: bool, group: str, backend: str
) -> tuple[ForwardOutputs, Tensor | None]:
    """The forward op, and the counts of the group's ranks where statistics are theirs; differentiable."""
    result = FlatOutputs(
        *torch.ops.seqconv_triton.stage_forward(
            x=x, shortcut=shortcut, **flatten(stage, group, backend), keep=keep, keep_inner=keep_inner
        )
    )
    statistics = None
    if stage.statistics == "batch":
        inner = (result.reduce_norm_mean, result.reduce_norm_var) if stage.norms.inner is not None else (None, None)
        statistics = BatchStatistics(result.norm_mean, result.norm_var, *inner)
    z = result.z if keep_inner and stage.plan.bottleneck else None
    outputs = ForwardOutputs(result.out, result.buffer if keep else None, z, statistics)
    return outputs, result.counts if group and statistics is not None else None


def profiled(what: str, plan: Plan) -> AbstractContextManager[Any]:
    """A range that profilers show: `stage_forward 256→512 k64 J36`."""
    text = f"{what} {plan.in_channels}→{plan.out_channels} k{plan.group_width} J{len(plan.groups)}"
    return torch.profiler.record_function(text)


def _flat_outputs(outputs: ForwardOutputs, counts: Tensor | None) -> tuple[Tensor, ...]:
    tensors = (*outputs[:3], *(outputs.statistics or (None,) * 4), counts)
    return tuple(outputs.out.new_empty(0) if t is None else t for t in tensors)


@torch.library.custom_op(
    "seqconv_triton::stage_forward",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? shortcut, {TENSORS}, {CONSTANTS}, bool keep, bool keep_inner) "
    f"-> ({', '.join(['Tensor'] * len(FlatOutputs._fields))})",
)
def stage_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = named(FORWARD_NAMES, arguments)
    x: Tensor = call["x"]
    if x.numel() == 0:
        return _fake_forward(*arguments)
    stage = unflatten(call)
    # Triton launches on the current device.
    with torch.cuda.device_of(x), profiled("stage_forward", stage.plan):
        if call["group"] and stage.statistics == "batch":
            stage = stage._replace(ranks=AcrossRanks.meet(call["group"], x))
        outputs = implementation(call["backend"], x).forward(
            x, call["shortcut"], stage, keep=call["keep"], keep_inner=call["keep_inner"]
        )
    return _flat_outputs(outputs, None if stage.ranks is None else stage.ranks.counts)


@stage_forward.register_fake
def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = named(FORWARD_NAMES, arguments)
    x, stage, counts = call["x"], unflatten(call), None
    if call["group"] and stage.statistics == "batch":
        counts = x.new_empty(process_group(call["group"]).size(), dtype=torch.float64)
    return _flat_outputs(empty_outputs(x, stage, keep=call["keep"], keep_inner=call["keep_inner"]), counts)


def _flat_gradients(gradients: Gradients, buffer: Tensor) -> tuple[Tensor, ...]:
    return tuple(buffer.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.custom_op(
    "seqconv_triton::stage_backward",
    mutates_args=(),
    schema=f"(Tensor? d_out, Tensor? d_buffer, Tensor buffer, Tensor z, {TENSORS}, Tensor counts, {CONSTANTS}, "
    f"bool[] needs) -> ({', '.join(['Tensor'] * len(Gradients._fields))})",
)
def stage_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = named(BACKWARD_NAMES, arguments)
    buffer, z = call["buffer"], call["z"]
    if buffer.numel() == 0:
        return tuple(gradient.zero_() for gradient in _fake_backward(*arguments))
    stage = unflatten(call)
    if call["group"] and stage.statistics == "batch":
        stage = stage._replace(ranks=AcrossRanks(process_group(call["group"]), call["counts"]))
    with torch.cuda.device_of(buffer), profiled("stage_backward", stage.plan):
        gradients = implementation(call["backend"], buffer).backward(
            call["d_out"], call["d_buffer"], buffer, z if z.numel() else None, stage, Needs(*call["needs"])
        )
    return _flat_gradients(gradients, buffer)


@stage_backward.register_fake
def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = named(BACKWARD_NAMES, arguments)
    return _flat_gradients(empty_gradients(call["buffer"], unflatten(call), Needs(*call["needs"])), call["buffer"])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, outputs = named(FORWARD_NAMES, inputs), FlatOutputs(*output)
    if not call["keep"]:  # inside vmap nothing says that it requires a gradient
        raise NotImplementedError(
            "gradients do not pass seqconv_triton's fused ops inside torch.func.vmap; compute under "
            '`with seqconv_triton.use_backend("reference"):`'
        )
    if call["statistics"] == "batch":
        call |= {name: t for name, t in outputs._asdict().items() if name in TENSOR_NAMES}
    tensors = [outputs.buffer, outputs.z, *(call[name] for name in TENSOR_NAMES), outputs.counts]
    ctx.save_for_backward(*tensors)
    ctx.strides = [None if t is None else t.stride() for t in tensors]
    ctx.constants = [call[name] for name in CONSTANT_NAMES]
    ctx.switches = copy_context()  # pinned tiles and the like: on a GPU backward runs in a thread of autograd's
    ctx.mark_non_differentiable(*outputs[2:])
    ctx.set_materialize_grads(False)


def _as_saved(ctx: Any) -> list[Tensor | None]:
    """The saved tensors. One that a hook, or offloading, gives back with other strides is laid out as it was."""
    return [
        t if t is None or t.stride() == strides else t.new_empty_strided(t.shape, strides).copy_(t)
        for t, strides in zip(ctx.saved_tensors, ctx.strides, strict=True)
    ]


def _backward(ctx: Any, d_out: Tensor | None, d_buffer: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needed = named(FORWARD_NAMES, ctx.needs_input_grad)
    if d_out is None and d_buffer is None:
        return (None,) * len(needed)
    needs = [needed[name] for name in Needs._fields]
    operands = d_out, d_buffer, *_as_saved(ctx), *ctx.constants, needs
    result = ctx.switches.copy().run(torch.ops.seqconv_triton.stage_backward, *operands)
    gradients = Gradients(*result)._asdict()
    return tuple(gradients[name] if wanted else None for name, wanted in needed.items())


def _no_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "seqconv_triton's fused backward is not differentiable again; for second derivatives compute the forward pass "
        'under `with seqconv_triton.use_backend("reference"):`'
    )


stage_forward.register_autograd(_backward, setup_context=_save)
stage_backward.register_autograd(_no_double_backward)

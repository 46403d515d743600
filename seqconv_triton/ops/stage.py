"""`stage`: the function behind the modules. It checks, casts under autocast, and calls the chosen backend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from seqconv_triton.backend import backend_for, reference, traced
from seqconv_triton.backend.contract import (
    Convs,
    Norms,
    NormVectors,
    StageArguments,
    StageOutput,
    StatisticsMode,
    statistics_dtype,
)
from seqconv_triton.ops.checks import check_images, check_stage
from seqconv_triton.ops.flops import register_flops
from seqconv_triton.ops.registered import run_stage
from seqconv_triton.plan import Plan

# Asked once, since torch.compile of torch 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(device)
)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that an active autocast asks of x; None without one, and for float64, which it leaves alone."""
    device = x.device.type
    if x.dtype == torch.float64 or device not in AUTOCAST_DEVICES:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast casts nothing more; an exporter would record one that is not needed."""
    device = x.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def stage(
    x: Tensor,
    convs: Convs,
    norms: Norms,
    plan: Plan,
    *,
    statistics: StatisticsMode = "batch",
    shortcut: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    keep_buffer: bool = False,
    recompute: bool = False,
    process_group: str = "",
) -> StageOutput:
    """A whole stage, or a single layer.

    x [N, C, H, W] is raw if plan.raw_input, else activated. `statistics` says what BN normalises with: "batch", the
    batch's own, which the output then holds; "running", the mean and var of `norms`; "folded", nothing: weight and bias
    are a scale and a shift. Mean and var are only looked at where they are "running".
    `shortcut` [N, J·k, H, W] is added to a single layer's raw output, `mask` [N, plan.mask_channels] multiplies the
    channels that each group, and the tail, sees. `keep_buffer` also returns the raw features
    [N, plan.total_channels, H, W]: the input and every group's. `recompute` does not keep z, the 1×1 convs' outputs,
    for the backward pass. With `process_group` (a name that torch.distributed knows) the batch is that of all its
    ranks, and every rank must come here.

    Under autocast x, shortcut and conv weights are cast; BN parameters and statistics stay float32.
    Raises TypeError or ValueError for what does not fit together.
    """
    check_images("x", x, plan.in_channels)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        shortcut = None if shortcut is None else shortcut.to(dtype)
        convs = Convs(*(None if weight is None else weight.to(dtype) for weight in convs))  # type: ignore[arg-type]
    process_group = process_group if statistics == "batch" else ""
    check_stage(x, convs, norms, plan, statistics, shortcut, mask, process_group)
    main, inner = norms
    precise = statistics_dtype(x.dtype)
    norms = Norms(_vectors(main, statistics, precise), None if inner is None else _vectors(inner, statistics, precise))
    arguments = StageArguments(plan, convs, norms, statistics, 0.0 if statistics == "folded" else eps, mask)

    backend = backend_for(x)
    with no_autocast(x):
        if backend == "traced" and statistics != "batch" and not keep_buffer:
            return StageOutput(traced.evaluate(x, shortcut, arguments), None, None)
        if backend in ("reference", "traced"):
            return reference.stage(x, shortcut, arguments, keep_buffer, process_group)
        if not torch.compiler.is_compiling():
            _refuse_transforms()
            register_flops()
        inputs = (x, shortcut, *convs, *norms.main, *(norms.inner or ()))
        differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        outputs, counts = run_stage(
            x, shortcut, arguments, keep_buffer or differentiable, differentiable and not recompute,
            process_group, backend,
        )  # fmt: skip
    return StageOutput(outputs.out, outputs.buffer if keep_buffer else None, outputs.statistics, counts)


def _vectors(norm: NormVectors, statistics: StatisticsMode, dtype: torch.dtype) -> NormVectors:
    """In the dtype of statistics, with those that the mode asks for."""
    weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
    if statistics != "running" or norm.mean is None or norm.var is None:
        return NormVectors(weight, bias)
    return NormVectors(weight, bias, norm.mean.to(dtype), norm.var.to(dtype))


def _refuse_transforms() -> None:
    """PyTorch would drop forward-mode tangents silently, and functorch names no way out."""
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

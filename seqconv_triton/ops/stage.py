"""`stage`: the function behind the modules. It checks, casts under autocast, and calls the chosen backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from seqconv_triton.backend import backend_for, reference, traced
from seqconv_triton.backend.contract import StageOutput, StageParameters, Statistics
from seqconv_triton.backend.packing import statistics_dtype
from seqconv_triton.ops import registered  # noqa: F401  registers them
from seqconv_triton.ops.autocast import autocast_dtype, no_autocast
from seqconv_triton.ops.checks import check_images, check_stage
from seqconv_triton.ops.flops import register_flops
from seqconv_triton.plan import Plan
from seqconv_triton.plan_text import encode


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
    recompute: bool = False,
    process_group: str = "",
) -> StageOutput:
    """A whole stage, or a single layer.

    x [N, C, H, W] is raw if plan.raw_input, else activated. Without `statistics` every BN uses the batch's, which the
    output then holds; with them BN is folded, and `backend.FOLDED` says that the affines hold them already.
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
        parameters = _cast(parameters, dtype, lambda name: "norm" not in name)
    check_stage(x, parameters, plan, statistics, shortcut, mask, process_group)
    precise = statistics_dtype(x.dtype)
    parameters = _cast(parameters, precise, lambda name: "norm" in name)
    if statistics is not None:
        eps = 0.0 if statistics.mean is None else eps
        statistics = _cast(statistics, precise, lambda name: True)

    backend = backend_for(x)
    with no_autocast(x):
        if backend == "traced" and statistics is not None and not keep_buffer:
            return StageOutput(traced.evaluate(x, shortcut, parameters, statistics, mask, plan, eps), None, None)
        if backend in ("reference", "traced"):
            return reference.stage(x, shortcut, parameters, statistics, mask, plan, eps, keep_buffer, process_group)
        if not torch.compiler.is_compiling():
            _refuse_transforms()
            register_flops()
        differentiable = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, shortcut, *parameters)
        )
        keep = keep_buffer or differentiable
        out, buffer, _, *batch, counts = torch.ops.seqconv_triton.stage_forward(
            x, shortcut, *parameters, *(statistics or (None,) * 4), mask,
            encode(plan), eps, statistics is None, keep, differentiable and not recompute, process_group, backend,
        )  # fmt: skip
    taken = None
    if statistics is None:
        taken = Statistics(*(batch if plan.bottleneck else (*batch[:2], None, None)))
    return StageOutput(
        out, buffer if keep_buffer else None, taken, counts if process_group and statistics is None else None
    )


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


Packed = TypeVar("Packed", StageParameters, Statistics)


def _cast(packed: Packed, dtype: torch.dtype, chosen: Callable[[str], bool]) -> Packed:
    fields = zip(packed._fields, packed, strict=True)
    return type(packed)(*(t.to(dtype) if t is not None and chosen(name) else t for name, t in fields))  # type: ignore[arg-type]

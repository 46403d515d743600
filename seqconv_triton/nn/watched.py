"""BNs of a stage whose forward somebody waits for: hooks on them, or a forward put in the place of theirs.

A stage computes its BNs itself, so that theirs is not called. Where it is waited for, it is called behind the stage, on
the very features it stands for: tools that collect statistics see them, and running statistics are moved by it. What
hooks would change cannot be used any more: they must hand on what they are given, and a forward in the place of the
BN's own must return what the stage computed with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqconv_triton.backend.contract import NormVectors, StageOutput
from seqconv_triton.backend.packing import group_masks, window_weights
from seqconv_triton.nn.computed import MAKERS
from seqconv_triton.nn.norm import Reading, StageNorms, normalise
from seqconv_triton.plan import Plan

# How far apart two computations of one BN may be, relative; in half precision 0.1. For a forward in its own's place.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def fetch(*norms: nn.Module | None) -> Callable[[], None]:
    """Bring weights that accelerate brings for a module's forward alone; the result takes them away again."""
    offloaded: list[tuple[nn.Module, Any]] = [
        (norm, norm.__dict__["_hf_hook"]) for norm in norms if norm is not None and "_hf_hook" in norm.__dict__
    ]
    for norm, hook in offloaded:
        hook.pre_forward(norm)

    def put_back() -> None:
        for norm, hook in offloaded:
            hook.post_forward(norm, None)

    return put_back


def watched(module: nn.Module | None) -> bool:
    """Whether somebody waits for a module's forward; hooks that make or bring its weights do not."""
    if module is None:
        return False
    before = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, MAKERS)]
    hooks = before or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or (has_other_forward(module) and "_hf_hook" not in module.__dict__)


def has_other_forward(module: nn.Module) -> bool:
    """Whether a forward stands in the place of its class's; accelerate leaves that one there when its hooks go."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def show(
    shown: Sequence[nn.Module | None],
    norm: nn.Module,
    reduce_norm: nn.Module | None,
    output: StageOutput,
    read: StageNorms,
    reduce_weight: Tensor | None,
    plan: Plan,
    mask: Tensor | None,
) -> None:
    """Call those of a stage's BNs that are `shown` on what they would have been called on; `output` has the buffer.

    They are named, since a hook may take itself or others away. Raises NotImplementedError for backward hooks,
    RuntimeError where a hook changes what goes in or comes out, or a forward returns something else.
    """
    raw, batch = output.buffer, output.statistics
    assert raw is not None
    offset = plan.total_channels - plan.normalized_channels
    mean, var, inner_mean, inner_var = (None,) * 4 if batch is None else batch
    if norm in shown:
        _call("norm", norm, raw[:, offset:], read.main, mean, var)
    if reduce_norm is not None and read.inner is not None and reduce_weight is not None and reduce_norm in shown:
        seen = torch.cat([raw[:, :offset], normalise(raw[:, offset:], read.main).relu()], 1)
        reduced = _reduced(seen, reduce_weight, plan, mask)
        _call("reduce_norm", reduce_norm, reduced, read.inner, inner_mean, inner_var)


def _call(name: str, norm: nn.Module, raw: Tensor, bn: Reading, mean: Tensor | None, var: Tensor | None) -> None:
    """Call a BN on its features [N, channels, H, W]; mean and var are the batch's, where the stage has used those."""
    if (norm._backward_hooks or norm._backward_pre_hooks) and torch.is_grad_enabled() and raw.requires_grad:
        raise NotImplementedError(
            f"{name} has backward hooks, and no gradient passes it: a stage computes its BNs itself. Hook the stage, "
            "or take torch.autograd.grad with respect to stage.run(x, keep_buffer=True).buffer, the raw features"
        )
    from torch._subclasses import FakeTensor  # brings Triton

    if torch.compiler.is_compiling() or raw.is_meta or isinstance(raw, FakeTensor):  # there is nothing to compare
        norm(raw)
        return
    calls: list[tuple[Tensor, Tensor]] = []
    given, thread = raw.detach().clone(), threading.get_ident()

    def note(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        if module is norm and threading.get_ident() == thread:  # others see this hook, too
            calls.append((inputs[0], out.detach().clone()))

    handle = norm.register_forward_hook(note, prepend=True)
    try:
        out = norm(raw)
    finally:
        handle.remove()
    (seen, own), *more = calls
    unchanged = not more and _same(seen, given) and _same(out, own)
    if has_other_forward(norm):
        unchanged = unchanged and _close(own.double(), _expected(raw, bn, mean, var), TOLERANCE.get(raw.dtype, 0.1))
    if not unchanged:
        raise RuntimeError(
            f"a hook on {name}, or a forward in the place of its own, returned something else than its BN: a stage "
            "computes its BNs itself and cannot use that"
        )


def _same(one: object, other: Tensor) -> bool:
    """To the bit, or NaN in both."""
    return (
        isinstance(one, Tensor)
        and (one.shape, one.dtype) == (other.shape, other.dtype)
        and torch.allclose(one.detach(), other, rtol=0, atol=0, equal_nan=True)
    )


@torch.no_grad()
def _expected(raw: Tensor, bn: Reading, mean: Tensor | None, var: Tensor | None) -> Tensor:
    """What a stage computed with, in float64."""
    if mean is not None:
        bn = bn._replace(vectors=bn.vectors._replace(mean=mean, var=var), statistics="running")
    # Of a network in half precision the batch's vectors are wider than its own.
    wide = torch.promote_types(raw.dtype, torch.float32)
    weight, bias, *statistics = (None if vector is None else vector.to(wide) for vector in bn.vectors)
    assert weight is not None and bias is not None
    return normalise(raw.to(wide), bn._replace(vectors=NormVectors(weight, bias, *statistics))).double()


def _close(out: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Where images are NaN, or overflow, both are."""
    known = expected.isfinite()
    if out.shape != expected.shape or not torch.equal(known, out.isfinite()):
        return False
    return bool((out - expected)[known].norm() <= tolerance * expected[known].norm())


def _reduced(seen: Tensor, weight: Tensor, plan: Plan, mask: Tensor | None) -> Tensor:
    """The outputs of all 1×1 convs [N, J·k, H, W] over the activated buffer `seen`."""
    masks = None if mask is None else group_masks(mask.to(seen.dtype), plan)
    outputs = []
    for j, (group, conv) in enumerate(zip(plan.groups, window_weights(weight.to(seen.dtype), plan, 1), strict=True)):
        window = seen[:, group.window_start : group.window_start + group.window_width]
        outputs.append(F.conv2d(window if masks is None else window * masks[j][:, :, None, None], conv))
    return torch.cat(outputs, 1)

"""BNs of a stage whose forward somebody waits for: hooks on them, or a forward put in the place of theirs.

A stage computes its BNs itself, so that theirs is not called. Where it is waited for, it is called behind the stage, on
the very features it stands for: tools that collect statistics see them, and running statistics are moved by it. What
hooks would change cannot be used any more: they must hand on what they are given, and a forward in the place of the
BN's own must return what the stage computed with, with the gradients that a BN has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from seqconv_triton.backend.contract import NormVectors, StageOutput
from seqconv_triton.backend.packing import group_masks, window_weights
from seqconv_triton.backend.ranks import Known
from seqconv_triton.nn.computed import MAKERS
from seqconv_triton.nn.frozen_trial import VECTORS, same
from seqconv_triton.nn.norm import Reading, StageNorms, knowing, normalise
from seqconv_triton.nn.norm import read as read_norm
from seqconv_triton.plan import Plan

# How far apart two computations of one BN may be, relative; in half precision 0.1. For a forward in its own's place.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def fetch(x: Tensor, *norms: nn.Module | None) -> Callable[[], None]:
    """Bring weights that are brought for a module's own forward alone; the result takes them away again.

    By accelerate, or by whoever has a pre-forward hook, where they are missing; then the BN is watched, and its forward
    hooks will take them away.
    """
    brought: list[tuple[nn.Module, Any]] = []
    for norm in norms:
        if norm is None:
            continue
        of_accelerate = _hooks_of_accelerate(norm)
        brought += [(norm, hook) for hook in of_accelerate if _brings_weights(hook)]
        if norm._forward_pre_hooks and not of_accelerate and _lacks_weights(norm) and not x.is_meta:
            for number, hook in list(norm._forward_pre_hooks.items()):
                keywords: tuple[Any, ...] = ({},) if number in norm._forward_pre_hooks_with_kwargs else ()
                hook(norm, (x.new_empty((0, 1, 1, 1)),), *keywords)
    for norm, hook in brought:
        hook.pre_forward(norm)

    def put_back() -> None:
        for norm, hook in reversed(brought):
            hook.post_forward(norm, None)

    return put_back


def _lacks_weights(norm: nn.Module) -> bool:
    vectors = (getattr(norm, vector, None) for vector in VECTORS)
    tensors = [vector for vector in vectors if isinstance(vector, Tensor) and not is_lazy(vector)]
    return any(tensor.is_meta or tensor.numel() == 0 for tensor in tensors)


def _hooks_of_accelerate(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _brings_weights(hook: Any) -> bool:
    """Which those of accelerate do; other hooks of its kind want to see what goes in and comes out."""
    return any(kind.__name__ in ("AlignDevicesHook", "LayerwiseCastingHook") for kind in type(hook).__mro__)


def watched(module: nn.Module | None) -> bool:
    """Whether somebody waits for a module's forward; hooks that make or bring its weights do not."""
    if module is None:
        return False
    before = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, MAKERS)]
    hooks = before or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    of_accelerate = _hooks_of_accelerate(module)
    if of_accelerate:
        return bool(hooks) or not all(_brings_weights(hook) for hook in of_accelerate)
    return bool(hooks) or has_other_forward(module)


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

    They are named, since a hook may take itself or others away. Raises NotImplementedError for hooks that wait for a
    gradient, RuntimeError where a hook changes what goes in or comes out or what the BN computes with, or a forward
    returns something else.
    """
    raw = output.buffer
    assert raw is not None
    offset = plan.total_channels - plan.normalized_channels
    batch = inner_batch = None
    if output.statistics is not None:
        mean, var, inner_mean, inner_var = output.statistics
        own = raw.new_full((1,), raw.shape[0] * raw.shape[2] * raw.shape[3], dtype=torch.float64)
        count = (own if output.counts is None else output.counts).sum()
        batch = Known(mean, var, count)
        inner_batch = None if inner_mean is None or inner_var is None else Known(inner_mean, inner_var, count)
    reduced = None
    if reduce_norm is not None and read.inner is not None and reduce_weight is not None and reduce_norm in shown:
        # Before a hook may change the other BN.
        seen = torch.cat([raw[:, :offset], normalise(raw[:, offset:], read.main, known=batch).relu()], 1)
        reduced = _reduced(seen, reduce_weight, plan, mask)
    if norm in shown:
        _call("norm", norm, raw[:, offset:], read.main, batch)
    if reduced is not None and reduce_norm is not None and read.inner is not None:
        _call("reduce_norm", reduce_norm, reduced, read.inner, inner_batch)


def _call(name: str, norm: nn.Module, raw: Tensor, bn: Reading, batch: Known | None) -> None:
    """Call a BN on its features [N, channels, H, W]; `batch` are their statistics, where the stage has used those."""
    no_gradient = NotImplementedError(
        f"{name} has backward hooks, or a hook on it waits for the gradient of what it was given, and none passes it: "
        "a stage computes its BNs itself. Hook the stage, or take torch.autograd.grad with respect to "
        "stage.run(x, keep_buffer=True).buffer, the raw features"
    )
    if (norm._backward_hooks or norm._backward_pre_hooks) and torch.is_grad_enabled() and raw.requires_grad:
        raise no_gradient
    from torch._subclasses import FakeTensor  # brings Triton

    if torch.compiler.is_compiling() or raw.is_meta or isinstance(raw, FakeTensor):  # there is nothing to compare
        norm(raw)
        return
    given, thread, replaced = raw.detach().clone(), threading.get_ident(), has_other_forward(norm)
    bn = bn._replace(vectors=NormVectors._make(None if v is None else v.detach().clone() for v in bn.vectors))
    waiting: list[object] = []  # before the BN's own hooks: those for all modules may wait for gradients
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def ours(module: nn.Module) -> bool:  # others see these hooks, too
        return module is norm and threading.get_ident() == thread

    def first(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if ours(module):
            waiting.append(_waits(raw))

    def last(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if ours(module) and not _as_read(read_norm(name, norm, raw), bn):
            raise RuntimeError(
                f"a hook on {name} changes what its BN computes with, its mode, eps, weights or statistics: a stage "
                "computes its BNs itself and has read them already; change them before the stage is called"
            )

    def note(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        if ours(module):
            waiting.append(_waits(out))
            calls.append((inputs[0], out, out.detach().clone()))

    handles = (
        norm.register_forward_pre_hook(first, prepend=True),
        norm.register_forward_pre_hook(last),
        norm.register_forward_hook(note, prepend=True),
    )
    try:
        with knowing(norm, batch if bn.group else None):
            out = norm(raw)
    finally:
        for handle in handles:
            handle.remove()
    (seen, returned, own), *more = calls
    unchanged = not more and same(seen, given) and same(out, own) and (out is returned or not returned.requires_grad)
    if replaced:
        unchanged = unchanged and _close(own.double(), _expected(raw, bn, batch), TOLERANCE.get(raw.dtype, 0.1))
    if not unchanged:
        raise RuntimeError(
            f"a hook on {name}, or a forward in the place of its own, returned something else than its BN, or called "
            "it again: a stage computes its BNs itself and cannot use that"
        )
    if [_waits(raw), _waits(out)] != waiting:
        raise no_gradient


def _waits(tensor: Tensor) -> object:
    """Who waits for a tensor's gradient, as far as PyTorch tells."""
    return tensor.requires_grad, list(tensor._backward_hooks or ()), tensor.requires_grad and tensor.retains_grad


def _as_read(now: Reading, then: Reading) -> bool:
    """Whether a BN would compute with what a stage has read; but for the last bits of weights that are computed."""
    used = 4 if then.statistics == "running" else 2
    return (now.statistics, now.eps, now.group) == (then.statistics, then.eps, then.group) and all(
        one is None if other is None else same(one, other, 1e-5)
        for one, other in zip(now.vectors[:used], then.vectors[:used], strict=True)
    )


@torch.no_grad()
def _expected(raw: Tensor, bn: Reading, batch: Known | None) -> Tensor:
    """What a stage computed with, in float64."""
    if batch is not None:
        bn = bn._replace(vectors=bn.vectors._replace(mean=batch.mean, var=batch.var), statistics="running")
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

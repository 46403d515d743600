"""Operation counts of our ops for torch.utils.flop_counter: two a multiply-add, convs only, as PyTorch counts its own.

The formulas are registered once that module has been imported: importing it here would import Triton.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from seqconv_triton.plan_text import decode


def register_flops() -> None:
    """Make flop counters know our ops, also one that was made before them; costs nothing where none was imported."""
    if "torch.utils.flop_counter" not in sys.modules:
        return
    formulas = _register()
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.update(formulas)


@cache
def _register() -> dict[Any, Callable[..., int]]:
    from torch.utils import flop_counter

    ops = torch.ops.seqconv_triton
    formulas = {
        ops.stage_forward: stage_forward,
        ops.stage_backward: stage_backward,
        ops.stem_conv: stem_conv,
        ops.stem_conv_backward: stem_conv_backward,
    }
    for op, formula in formulas.items():
        flop_counter.register_flop_formula(op)(formula)  # type: ignore[arg-type]
    return {op: flop_counter.flop_registry[op] for op in formulas}


# Tensors arrive as their shapes.
def stage_forward(x: list[int], *arguments: Any, **_: Any) -> int:
    plan = decode(next(a for a in arguments if isinstance(a, str)))
    return 2 * x[0] * sum(plan.multiply_adds(x[2], x[3]))


def stage_backward(d_out: Any, d_buffer: Any, buffer: list[int], z: list[int], *arguments: Any, **_: Any) -> int:
    """The gradient of every conv's input, of the weights that are not frozen, and z again where it was not kept."""
    plan = decode(next(a for a in arguments if isinstance(a, str)))
    needs = next(a for a in arguments if isinstance(a, list) and a and isinstance(a[0], bool))
    reduce, transform, tail = plan.multiply_adds(buffer[2], buffer[3])
    weights = needs[2] * reduce + needs[5] * transform + needs[8] * tail
    again = reduce if math.prod(z) == 0 else 0
    return 2 * buffer[0] * (reduce + transform + tail + weights + again)


def stem_conv(x: Any, weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    return 2 * math.prod(weight) * out_shape[0] * out_shape[2] * out_shape[3]


def stem_conv_backward(d_out: list[int], x: Any, weight: list[int], stride: int, needs: list[bool], **_: Any) -> int:
    return 2 * math.prod(weight) * d_out[0] * d_out[2] * d_out[3] * sum(needs)

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

from seqconv_triton.backend.contract import Needs
from seqconv_triton.ops.registered import BACKWARD_NAMES, FORWARD_NAMES, named
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
    formulas: dict[Any, Callable[..., int]] = {
        ops.stage_forward: stage_forward,
        ops.stage_backward: stage_backward,
        ops.stem_conv: stem_conv,
        ops.stem_conv_backward: stem_conv_backward,
    }
    for op, formula in formulas.items():
        flop_counter.register_flop_formula(op)(formula)
    return {op: flop_counter.flop_registry[op] for op in formulas}


# Tensors arrive as their shapes.
def stage_forward(*arguments: Any, **_: Any) -> int:
    call = named(FORWARD_NAMES, arguments)
    images, _channels, height, width = call["x"]
    return 2 * images * sum(decode(call["plan"]).multiply_adds(height, width))


def stage_backward(*arguments: Any, **_: Any) -> int:
    """The gradient of every conv's input, of the weights that are not frozen, and z again where it was not kept."""
    call = named(BACKWARD_NAMES, arguments)
    images, _channels, height, width = call["buffer"]
    needs = Needs(*call["needs"])
    reduce, transform, tail = decode(call["plan"]).multiply_adds(height, width)
    weights = needs.reduce_weight * reduce + needs.transform_weight * transform + needs.tail_weight * tail
    again = reduce if math.prod(call["z"]) == 0 else 0
    return 2 * images * (reduce + transform + tail + weights + again)


def stem_conv(x: Any, weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    return 2 * math.prod(weight) * out_shape[0] * out_shape[2] * out_shape[3]


def stem_conv_backward(d_out: list[int], x: Any, weight: list[int], stride: int, needs: list[bool], **_: Any) -> int:
    return 2 * math.prod(weight) * d_out[0] * d_out[2] * d_out[3] * sum(needs)

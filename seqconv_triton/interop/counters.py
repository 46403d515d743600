"""Multiply-adds for counters that go by the type of a module: `thop.profile(model, (x,), custom_ops=counters.THOP)` and
`ptflops.get_model_complexity_info(model, size, custom_modules_hooks=counters.PTFLOPS, …)`.

Neither package is imported. They count convs and the classifier, as `python -m seqconv_triton info` does; both add what
PyTorch's own modules outside the stages do (BN, ReLU) by their own rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from seqconv_triton.nn.classifier import PublishedClassifier
from seqconv_triton.nn.layers import PackedSeqConv, SeqConv2d, Stage
from seqconv_triton.nn.stem import StemConv2d


def multiply_adds(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """Those of one call of a stage, a layer, a conv or a classifier."""
    x = inputs[0]
    if isinstance(module, PackedSeqConv):
        return x.shape[0] * sum(module.plan.multiply_adds(*x.shape[2:]))
    assert isinstance(module, nn.Conv2d | nn.Linear)
    inside = module.weight[0].numel()
    return inside * (output.numel())


def thop(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    module.total_ops += multiply_adds(module, inputs, output)


def ptflops(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    module.__flops__ += multiply_adds(module, inputs, output)


Hooks = dict[type[nn.Module], Callable[[Any, tuple[Tensor, ...], Tensor], None]]
TYPES = (Stage, SeqConv2d, StemConv2d, PublishedClassifier)
THOP: Hooks = dict.fromkeys(TYPES, thop)
PTFLOPS: Hooks = dict.fromkeys(TYPES, ptflops)

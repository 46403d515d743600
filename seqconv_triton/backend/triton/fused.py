"""The Triton backend as `ops/registered.py` calls it (`contract.FusedBackend`).

Where PyTorch's convolutions must not use TF32, float32 on a GPU is theirs: exact products have no matrix instruction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqconv_triton.backend.aten import fused as aten
from seqconv_triton.backend.contract import ForwardOutputs, Gradients, Needs, StageArguments, empty_gradients
from seqconv_triton.backend.triton.backward import launch_backward
from seqconv_triton.backend.triton.forward import launch_forward
from seqconv_triton.backend.triton.parts import check, dense
from seqconv_triton.kernels.launch import precision


def exact(x: Tensor) -> bool:
    """Whether products of float32 must be."""
    return x.is_cuda and x.dtype == torch.float32 and precision(x.dtype) != "tf32"


def forward(
    x: Tensor, shortcut: Tensor | None, stage: StageArguments, *, keep: bool, keep_inner: bool
) -> ForwardOutputs:
    """As `contract.FusedBackend` says. Raises TypeError or ValueError for what the kernels do not take."""
    if exact(x):
        return aten.forward(x, shortcut, stage, keep=keep, keep_inner=keep_inner)
    check(x, stage.plan)
    return launch_forward(x, shortcut, dense(stage), keep=keep, keep_inner=keep_inner)


def backward(
    d_out: Tensor | None,
    d_buffer: Tensor | None,
    buffer: Tensor,
    z: Tensor | None,
    stage: StageArguments,
    needs: Needs,
) -> Gradients:
    """As `contract.FusedBackend` says."""
    if exact(buffer):
        return aten.backward(d_out, d_buffer, buffer, z, stage, needs)
    check(buffer, stage.plan)
    gradients = empty_gradients(buffer, stage, needs)
    launch_backward(d_out, d_buffer, buffer, z, dense(stage), gradients)
    return gradients

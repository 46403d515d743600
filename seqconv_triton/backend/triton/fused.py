"""The Triton backend as `ops/registered.py` calls it (`contract.FusedBackend`)."""

from __future__ import annotations

from torch import Tensor

from seqconv_triton.backend.contract import ForwardOutputs, Gradients, Needs, StageArguments
from seqconv_triton.backend.triton.backward import launch_backward
from seqconv_triton.backend.triton.forward import launch_forward
from seqconv_triton.backend.triton.parts import check


def forward(
    x: Tensor, shortcut: Tensor | None, stage: StageArguments, *, keep: bool, keep_inner: bool
) -> ForwardOutputs:
    """As `contract.FusedBackend` says. Raises TypeError or ValueError for what the kernels do not take."""
    check(x, stage.plan)
    return launch_forward(x, shortcut, stage, keep=keep, keep_inner=keep_inner)


def backward(
    d_out: Tensor | None,
    d_buffer: Tensor | None,
    buffer: Tensor,
    z: Tensor | None,
    stage: StageArguments,
    needs: Needs,
) -> Gradients:
    """As `contract.FusedBackend` says."""
    check(buffer, stage.plan)
    return launch_backward(d_out, d_buffer, buffer, z, stage, needs)

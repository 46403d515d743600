"""The backends, one contract, and the switch between them.

A backend computes a stage (a single layer is a stage of one layer without a tail). Tensors are packed as in
`StageParameters`; P = N·H·W pixels, J groups of k channels, B = plan.total_channels buffer channels.

- `reference` is plain differentiable PyTorch: the specification, and what supports double backward.
- every other backend is a module with `stage_forward` and `stage_backward`, which `ops.py` registers as one op.

The folder is not called `backends`: torch.compile refuses to trace any file whose path contains "triton/backends".
"""

from __future__ import annotations

import difflib
import importlib.util
from functools import cache
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("reference", "aten", "triton")

_chosen: str | None = None


class StageParameters(NamedTuple):
    """The packed parameters of a stage; the reduce entries are None in basic layers, the tail's without a tail."""

    reduce_weight: Tensor | None  # [J·k, C]; flat where windows differ
    reduce_norm_weight: Tensor | None  # [J·k]
    reduce_norm_bias: Tensor | None  # [J·k]
    transform_weight: Tensor  # [J·k, k/s, 3, 3]; basic: [J·k, C, 3, 3], flat where windows differ
    norm_weight: Tensor  # [plan.normalized_channels]
    norm_bias: Tensor  # [plan.normalized_channels]
    tail_weight: Tensor | None  # [plan.out_channels, …, kernel, kernel]


class Statistics(NamedTuple):
    """Mean and biased variance of every BN of a stage: running ones going in, a batch's coming out."""

    mean: Tensor | None  # [plan.normalized_channels]
    var: Tensor | None
    reduce_mean: Tensor | None  # [J·k]
    reduce_var: Tensor | None


# BN without statistics, as `fuse` leaves it: a channel's weight and bias are its scale and shift.
FOLDED = Statistics(None, None, None, None)


class StageGradients(NamedTuple):
    """Where a backend writes gradients; None where none is wanted. The BNs' come with the rest and are always there."""

    x: Tensor | None
    shortcut: Tensor | None
    parameters: WantedGradients


class WantedGradients(NamedTuple):
    """As StageParameters, but the conv weights' entries may be None."""

    reduce_weight: Tensor | None
    reduce_norm_weight: Tensor | None
    reduce_norm_bias: Tensor | None
    transform_weight: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    tail_weight: Tensor | None


class StageOutput(NamedTuple):
    """What a stage gives: `out` behind the tail (raw) or activated, the raw buffer if asked for, batch statistics.

    `counts` holds every rank's number of pixels where the statistics are those of a process group.
    """

    out: Tensor
    buffer: Tensor | None
    statistics: Statistics | None
    counts: Tensor | None = None


class use_backend:
    """Compute with the named backend inside a `with` block, whatever the device; `None` restores the default.

    Raises ValueError for an unknown name.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in BACKENDS:
            near = difflib.get_close_matches(str(name), BACKENDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown backend {name!r}{hint} (backends: {', '.join(BACKENDS)})")
        self.name = name
        self._outer: list[str | None] = []

    def __enter__(self) -> None:
        global _chosen
        self._outer.append(_chosen)
        _chosen = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._outer.pop()


def backend_for(x: Tensor) -> str:
    """The chosen backend, or the default of the tensor's device: triton on a GPU that has it, aten elsewhere.

    What is exported becomes a graph of PyTorch's own ops ("traced"), so that whoever loads it needs nothing of ours.
    """
    if _chosen is not None:
        return _chosen
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if traced or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return "traced"
    return "triton" if x.is_cuda and x.dtype != torch.float64 and has_triton() else "aten"


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None

"""The backends, one contract, and the switch between them.

`contract.py` says what a backend computes: `reference` is plain differentiable PyTorch, the specification, and what
supports double backward; the others are a `forward` and a `backward`, one registered op each.

The folder is not called `backends`: torch.compile refuses to trace any file whose path contains "triton/backends".
"""

from __future__ import annotations

import difflib
import importlib.util
from functools import cache
from types import TracebackType

import torch
from torch import Tensor

from seqconv_triton.backend import chosen

BACKENDS = ("reference", "aten", "triton")


class use_backend:
    """Compute with the named backend inside a `with` block, whatever the device; `None` restores the default.

    It holds for this thread (or asyncio task) alone: threads that start inside have the default. A backward pass
    computes with its forward pass's backend, wherever it runs. Raises ValueError for an unknown name.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in BACKENDS:
            near = difflib.get_close_matches(str(name), BACKENDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown backend {name!r}{hint} (backends: {', '.join(BACKENDS)})")
        self.name = name

    def __enter__(self) -> None:
        chosen.enter(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        chosen.leave()


def backend_for(x: Tensor) -> str:
    """The chosen backend, or the default of the tensor's device: triton on a GPU that has it, aten elsewhere.

    What is exported becomes a graph of PyTorch's own ops ("traced"), so that whoever loads it needs nothing of ours.
    """
    name = chosen.traced_or(chosen.name)
    if name is not None:
        return name
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if traced or is_exporting() or torch.onnx.is_in_onnx_export():
        return "traced"
    return "triton" if x.is_cuda and x.dtype != torch.float64 and has_triton() else "aten"


def is_exporting() -> bool:
    """Whether torch.export is at work: under torch 2.11's torch.compile, torch.compiler.is_exporting() is True too."""
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None

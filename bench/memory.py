"""Bytes: the peak of a run, and what a forward pass keeps for backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from bench.contenders import Contender
from bench.timing import unmarked
from seqconv_triton.backend.aten import memory as aten_memory
from seqconv_triton.backend.aten import packed as aten_packed


class Allocations(profile):
    """PyTorch's profiler without its digest of every op, which takes ten times as long as the run."""

    def _parse_kineto_results(self, *_: Any, **__: Any) -> Any:
        return []


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def peak(contender: Contender, device: torch.device) -> int:
    """Most bytes allocated at once in one run, with the weights, the optimizer's state and the input.

    On a GPU what the allocator counts; on a CPU the allocations and frees that torch's profiler sees, those inside
    custom ops and compiled code included, on top of what is there before the run.
    """
    contender.results.clear()
    for tensor in contender.state():
        tensor.grad = None
    before = storage_bytes(contender.state())
    if device.type == "cuda":
        torch.cuda.synchronize()
        others = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        contender.run(unmarked)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - others
    # What is kept from run to run would not be seen.
    aten_memory.release()
    aten_packed.forget()
    with Allocations(use_kineto=True, profile_memory=True) as profiler:
        contender.run(unmarked)
    changes = [
        (event.start_ns(), event.nbytes()) for event in profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = most = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        most = max(most, held)
    return before + most


def kept(contender: Contender) -> int:
    """Bytes that a training step's forward pass saves for backward, without weights, buffers and input."""
    own = {t.untyped_storage()._cdata for t in contender.state()}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address may come again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contender.run(unmarked)
    return sum(saved.values())

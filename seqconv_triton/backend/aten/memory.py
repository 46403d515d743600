"""What a training step keeps for backward on a CPU, in memory that the next step uses again.

The C library hands large blocks back to the system when they are freed, and every page of the next step's costs a fault
then: a tenth of the forward pass. A stage's blocks belong to its weights; they go with them, or at its next evaluation.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

LARGE = 2**20  # bytes; the C library keeps smaller blocks by itself

_taking = threading.Lock()
# A weight's storage → blocks that nobody uses now. Not the weight itself: PyTorch swaps none that has weak references.
_free = WeakIdKeyDictionary()


def empty_strided(owner: Tensor, like: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """An uninitialised dense tensor, with `like`'s dtype, in memory that belongs to the weight `owner`."""
    wanted = math.prod(size) * like.element_size()
    if like.device.type != "cpu" or wanted < LARGE:
        return like.new_empty_strided(size, stride)
    with _taking:
        blocks: list[Tensor] = _free.setdefault(owner.untyped_storage(), [])
        fitting = [i for i, block in enumerate(blocks) if block.numel() >= wanted]
        if fitting:
            block = blocks.pop(min(fitting, key=lambda i: blocks[i].numel()))
        else:
            blocks.clear()  # of a smaller batch
            block = torch.empty(wanted, dtype=torch.uint8)
    lease = block.numpy()  # dies with the last tensor over it
    weakref.finalize(lease, blocks.append, block).atexit = False
    # Not as a view, which autograd would not let a user change in place.
    tensor = like.new_empty(0).set_(torch.from_numpy(lease).untyped_storage(), 0, size, stride)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        tensor.fill_(torch.nan)
    return tensor


def release(owner: Tensor | None = None) -> None:
    """Free the blocks that nobody uses: those of a weight, or all."""
    with _taking:
        for blocks in list(_free.values()) if owner is None else [_free.get(owner.untyped_storage(), [])]:
            blocks.clear()

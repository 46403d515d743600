"""Autocast as the ops see it: which dtype it asks for, and how to leave it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


# Asked once, since torch.compile of torch 2.11 cannot trace the question.
DEVICES = frozenset(d for d in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(d))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that an active autocast asks of x; None without one, and for float64, which it leaves alone."""
    device = x.device.type
    if x.dtype == torch.float64 or device not in DEVICES:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast casts nothing more; an exporter would record one that is not needed."""
    device = x.device.type
    if device not in DEVICES or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)

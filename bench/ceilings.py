"""What this very device can do: bytes a second of a copy, operations a second of a matrix product."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from bench.timing import Mark, Run, interleave, timed


class Ceilings(NamedTuple):
    """Bytes per second (read and written) and operations per second (two a multiply-add)."""

    bytes_per_second: float
    operations_per_second: float

    def seconds(self, operations: float, moved: float) -> float:
        """No less than this, whatever the code."""
        return max(operations / self.operations_per_second, moved / self.bytes_per_second)


# For predictions where no GPU is at hand: a copy and a matrix product, measured on an H200 SXM in bfloat16.
H200 = Ceilings(4.3e12, 780e12)


def measure(device: torch.device, dtype: torch.dtype, rounds: int = 9) -> Ceilings:
    """The best of some rounds: a ceiling is what is possible, not what is usual."""
    gpu = device.type == "cuda"
    elements = (1 << 30) // 4 if gpu else (1 << 28) // 4
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    side = 8192 if gpu else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def copy(mark: Mark) -> None:
        target.copy_(source)
        mark("copy")

    def multiply(mark: Mark) -> None:
        torch.mm(left, right, out=product)
        mark("multiply")

    runs: dict[str, Run] = {"copy": copy, "multiply": multiply}
    found = interleave({name: partial(timed, run, device) for name, run in runs.items()}, rounds, warm_up=2)
    return Ceilings(
        2 * source.numel() * 4 / min(found["copy"]["copy"].seconds),
        2 * side**3 / min(found["multiply"]["multiply"].seconds),
    )

"""What this very device can do: bytes a second of a copy, operations a second of a matrix product."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch

from bench.timing import Mark, Run, interleave, timed
from seqconv_triton.tools.ceilings import Ceilings, Gpu


def measure(device: torch.device, dtype: torch.dtype, rounds: int = 9) -> Ceilings:
    """The best of some rounds: a ceiling is what is possible, not what is usual. A GPU's clock is its highest."""
    on_gpu = device.type == "cuda"
    elements = (1 << 30) // 4 if on_gpu else (1 << 28) // 4
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 2048
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
    measured = Ceilings(
        2 * source.numel() * 4 / min(found["copy"]["copy"].seconds),
        2 * side**3 / min(found["multiply"]["multiply"].seconds),
    )
    if not on_gpu:
        return measured
    gpu = torch.cuda.get_device_properties(device)
    return Gpu(
        measured.bytes_per_second, measured.operations_per_second, gpu.multi_processor_count, 1e3 * gpu.clock_rate,
        gpu.name,
    )  # fmt: skip


def launch_seconds(device: torch.device, rounds: int = 9) -> float:
    """What the clock shows for a GPU's least launch: no kernel alone can be timed at less."""
    one = torch.zeros(1, device=device)

    def least(mark: Mark) -> None:
        one.zero_()
        mark("launch")

    return min(interleave({"launch": partial(timed, least, device)}, rounds)["launch"]["launch"].seconds)


def restored(entries: dict[str, Any] | None) -> Ceilings | None:
    """Those of a results file."""
    if entries is None:
        return None
    kind = Gpu if "multiprocessors" in entries else Ceilings
    return kind(**{field.name: entries[field.name] for field in fields(kind)})

"""The dtype that the aten backend computes in: half precision only where a processor is faster in it.

Elsewhere oneDNN converts in every product, or adds at half the rate: three times as slow as float32 without any
instruction for it, and with AVX512-BF16 on Intel's processors still slower (docs/performance.md).
"""

from __future__ import annotations

import platform
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

Tensors = TypeVar("Tensors", bound=tuple[Tensor | None, ...])


@cache
def fast_in(dtype: torch.dtype) -> bool:
    """Whether this machine's processor has instructions for products of a half precision that repay it."""
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(torch.cpu, "get_capabilities"):
        return True  # nothing was measured there
    has = torch.cpu.get_capabilities()
    if dtype == torch.float16:
        return bool(has.get("amx_fp16"))
    intel = "intel" in str(has.get("cpu_name", "")).lower()
    return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and not intel))


def working_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or float32 for a half precision in which its device would be slower."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and x.device.type == "cpu" and not fast_in(x.dtype) else x.dtype


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """A named tuple of tensors in another dtype; what is None stays so."""
    return tensors._make(None if tensor is None else tensor.to(dtype) for tensor in tensors)  # type: ignore[attr-defined]

"""A kernel alone as contenders: "ours plain" launches it, "torch plain" is PyTorch's own ops on the same operands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import kernels
from bench.cases import Case
from bench.check import Expected, relative_error
from bench.contenders import DTYPES, Contender
from bench.participants import Local, Setting
from bench.timing import Mark


def setting(case: Case, device: torch.device) -> Setting:
    """Both contenders in this process, compared with PyTorch's ops in float32."""
    dtype = DTYPES[case.dtype]
    kernel = kernels.make(case.subject, case.batch, case.image, dtype, device)
    functions: dict[str, Callable[[], Tensor]] = {"torch plain": lambda: kernel.torch(dtype), "ours plain": kernel.ours}

    def start(label: str, _: int) -> Local:
        results: dict[str, Tensor] = {}

        def run(mark: Mark) -> None:
            results["output"] = functions[label]()
            mark("eval")

        return Local(Contender(label, run, results=results), case, device)

    def expected(_: str) -> Expected:
        exact = kernel.torch(torch.float32)
        return Expected({"output": exact}, {"output": relative_error(kernel.torch(dtype), exact)})

    return Setting(start, expected)

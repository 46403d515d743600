"""A kernel alone as contenders: "ours plain" launches it, "torch plain" is PyTorch's own ops on the same operands."""

from __future__ import annotations

from collections.abc import Callable

import torch

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
    functions: dict[str, Callable[[], kernels.Results]] = {
        "torch plain": lambda: kernel.torch(dtype),
        "ours plain": kernel.ours,
    }

    def start(label: str, _: int) -> Local:
        results: kernels.Results = {}

        def run(mark: Mark) -> None:
            results.update(functions[label]())
            mark("eval")

        return Local(Contender(label, run, results=results), case, device)

    def expected(_: str) -> Expected:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = kernel.torch(torch.float32)
        plain = kernel.torch(dtype)
        return Expected(exact, {name: relative_error(plain[name], value) for name, value in exact.items()})

    return Setting(start, expected)

"""A kernel alone as contenders: "ours plain" launches it, "torch plain" is PyTorch's own ops on the same operands."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case
from bench.check import Expected, Wrong, relative_error
from bench.contenders import DTYPES, Contender
from bench.runner import Prepared, identity
from bench.timing import Mark, Run, unmarked


def prepare_kernel(case: Case, device: torch.device) -> Prepared:
    """Both contenders, checked against PyTorch's ops in float32."""
    from bench import kernels

    dtype = DTYPES[case.dtype]
    kernel = kernels.make(case.subject, case.batch, case.image, dtype, device)
    exact, plain = kernel.torch(torch.float32), kernel.torch(dtype)
    expected = Expected({"output": exact}, {"output": relative_error(plain, exact)})
    prepared = Prepared()
    for label, function in (("torch plain", lambda: kernel.torch(dtype)), ("ours plain", kernel.ours)):
        if label not in case.contenders:
            continue
        results: dict[str, Tensor] = {}

        def run(mark: Mark, function: object = function, results: dict[str, Tensor] = results) -> None:
            results["output"] = function()  # type: ignore[operator]
            mark("eval")

        chosen: Run = run
        contender = Contender(label, chosen, results=results)
        row = identity(case, label)
        try:
            contender.run(unmarked)
            row["error"] = expected.check(contender.found(), case.dtype)
        except Wrong as reason:
            prepared.refused.append(row | {"wrong": str(reason)})
        except Exception as error:
            prepared.refused.append(row | {"failed": f"{type(error).__name__}: {error}"})
        else:
            prepared.right[label], prepared.facts[label] = contender, row
    return prepared

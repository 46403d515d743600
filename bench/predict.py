"""The launches that a case makes in the Triton backend, found on the meta device; importing this needs Triton."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from bench import kernels, roofline, subjects
from bench.cases import Case
from bench.contenders import DTYPES
from bench.roofline import Work
from seqconv_triton.kernels import launch


def case_work(case: Case) -> dict[str, list[Work]]:
    """Launches by part: eval, or forward and backward."""
    return dict(_work(case.subject, case.training, case.batch, case.image, case.dtype))


@lru_cache(maxsize=64)
def _work(subject: str, training: bool, batch: int, image: int, dtype: str) -> dict[str, list[Work]]:
    if subject.startswith("kernel "):
        return {"eval": kernel_work(subject, batch, image, DTYPES[dtype])}
    module, shape = subjects.make(subject, image)
    x = torch.empty(batch, shape.channels, shape.size, shape.size, device="meta", dtype=DTYPES[dtype])
    return roofline.module_work(module.to("meta"), x, training)


def kernel_work(subject: str, batch: int, image: int, dtype: torch.dtype) -> list[Work]:
    """The one launch of a kernel's case."""
    plan, shape = subjects.stage_of(subject.partition(", ")[2], image)
    found: list[Work] = []

    def note(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        found.append(roofline.work_of(plan, kernel, arguments, constants))

    operands = kernels.Operands(plan, batch, shape.size, dtype, torch.device("meta"))
    with launch.listen(note):
        kernels.FAMILIES[subject.removeprefix("kernel ").split(", ")[0]](operands).ours()
    return found

"""The launches that a case makes in the Triton backend, found on the meta device; importing this needs Triton."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from bench import kernels, roofline, subjects
from bench.cases import Case
from bench.contenders import DTYPES
from bench.operands import Operands
from seqconv_triton.kernels import configs, launch
from seqconv_triton.tools.cost import Work, work_of


def case_work(case: Case, architecture: str = "sm_90") -> dict[str, list[Work]]:
    """Launches by part: eval, or forward and backward; configured as for an architecture (`configs.architecture`)."""
    return dict(_work(case.subject, case.training, case.batch, case.image, case.dtype, architecture))


@lru_cache(maxsize=64)
def _work(subject: str, training: bool, batch: int, image: int, dtype: str, architecture: str) -> dict[str, list[Work]]:
    with configs.assume(architecture):
        if subject.startswith("kernel "):
            return {"eval": kernel_work(subject, batch, image, DTYPES[dtype])}
        module, shape = subjects.make(subject, image)
        images = (batch, shape.channels, shape.size, shape.size)
        return roofline.module_work(module.to("meta"), images, DTYPES[dtype], training)


def kernel_work(subject: str, batch: int, image: int, dtype: torch.dtype) -> list[Work]:
    """The one launch of a kernel's case."""
    plan, shape = subjects.stage_of(subject.partition(", ")[2], image)
    works: list[Work] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        works.append(work_of(plan, kernel, grid, arguments))

    with launch.listen(note):
        operands = Operands(plan, batch, shape.size, dtype, torch.device("meta"))
        kernel = kernels.FAMILIES[subject.removeprefix("kernel ").split(", ")[0]](operands)
        works.clear()
        kernel.ours()
    return works

"""Every case of the table in training, for one architecture and dtype in turn, half of them in evaluation too.

`make emulate` runs them all.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil

import pytest

from emulator.cases import ARCHITECTURES, CASES, DTYPES
from emulator.check import check
from emulator.configurations import listed
from seqconv_triton import kernels

GROUPS = list(itertools.product(ARCHITECTURES, DTYPES))
# A case whose pipeline peels a step off there, which must not shift by a negative tap.
PEELED = ("basic-k16-dropout", "sm_80", "fp16", True)
RUNS = {
    f"{'-'.join(group)}-{case}-{'train' if training else 'eval'}": (case, *group, training)
    for number, case in enumerate(CASES)
    for group in [GROUPS[number % len(GROUPS)]]
    for training in (True, False)
    if training or number // len(GROUPS) % 2 == 0
} | {"sm_80-fp16-peeled": PEELED}


def test_table_meets_every_kernel() -> None:
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    met = set().union(*(listed(case, "fp16", "sm_90")[1] for case in CASES.values()))
    assert len(written) > 4 and met == written


@pytest.mark.parametrize("run", RUNS)
def test_case(run: str) -> None:
    case, architecture, dtype, training = RUNS[run]
    outcome = check(CASES[case], dtype, architecture, training, seeds=(0, 1))
    assert not outcome.complaints, "\n".join(outcome.complaints)

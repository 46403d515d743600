"""Half of the table's cases in training, for one architecture and dtype in turn, half of those in evaluation too.

Together they meet every kernel. `make emulate` runs all cases in all of them, with more seeds.
"""

from __future__ import annotations

import itertools

import pytest

from emulator.cases import ARCHITECTURES, CASES, DTYPES
from emulator.check import check
from emulator.configurations import listed, written_kernels

GROUPS = list(itertools.product(ARCHITECTURES, DTYPES))
# A case whose pipeline peels a step off there, which must not shift by a negative tap.
PEELED = ("basic-k16-dropout", "sm_80", "fp16", True)
CHOSEN = (
    "basic-k8", "basic-k32", "basic-k64", "basic-dense-k16-odd", "basic-k16-dropout", "k8",
    "k8-one-pixel", "k8-s8", "k16-s2", "k24-s2", "k32", "k32-s32",
    "k64-s2-dropout", "k128-s8", "dense-k8-odd", "dense-k16-s2", "basic-k8-many-tiles", "k8-s2-many-readers",
    "stage-k8", "stage-k8-s2-repeats", "stage-basic-k16", "stage-dense-k8", "stage-k16-dropout-1x1", "stage-k64",
)  # fmt: skip
RUNS = {
    f"{'-'.join(group)}-{case}-{'train' if training else 'eval'}": (case, *group, training)
    for number, case in enumerate(CHOSEN)
    for group in [GROUPS[number % len(GROUPS)]]
    for training in (True, False)
    if training or number // len(GROUPS) % 2 == 0
} | {"sm_80-fp16-peeled": PEELED}


def test_table_meets_every_kernel() -> None:
    written = written_kernels()
    met = set().union(*(listed(case, "fp16", "sm_90").kernels for case in (CASES[name] for name in CHOSEN)))
    assert len(written) > 4 and met == written


@pytest.mark.parametrize("run", RUNS)
def test_case(run: str) -> None:
    case, architecture, dtype, training = RUNS[run]
    outcome = check(CASES[case], dtype, architecture, training, seeds=(0, 1))
    assert not outcome.complaints, "\n".join(outcome.complaints)

"""Every case of the table in training, for one architecture and dtype in turn, half of them in evaluation too.

`make emulate` runs them all.
"""

from __future__ import annotations

import itertools

import pytest

from emulator.cases import ARCHITECTURES, CASES, DTYPES
from emulator.check import check

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


@pytest.mark.parametrize("run", RUNS)
def test_case(run: str) -> None:
    case, architecture, dtype, training = RUNS[run]
    outcome = check(CASES[case], dtype, architecture, training, seeds=(0, 1))
    assert not outcome.complaints, "\n".join(outcome.complaints)

"""Every case of the table for one architecture and dtype, in turn; `make emulate` runs them all."""

from __future__ import annotations

import itertools

import pytest

from emulator.cases import ARCHITECTURES, CASES, DTYPES
from emulator.check import check

GROUPS = list(itertools.product(ARCHITECTURES, DTYPES))
SHARES = [(case, *GROUPS[number % len(GROUPS)]) for number, case in enumerate(CASES)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("case", "architecture", "dtype"), SHARES)
def test_case(case: str, architecture: str, dtype: str, training: bool) -> None:
    outcome = check(CASES[case], dtype, architecture, training, seeds=(0, 1))
    assert not outcome.complaints, "\n".join(outcome.complaints)

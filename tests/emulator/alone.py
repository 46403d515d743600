"""A pytest plugin: every test runs on the emulator, and what the emulator finds fails it.

    python -m pytest -p emulator.alone --emulate sm_80 tests/test_kernels.py

So the tests of single kernels, which the interpreter runs elsewhere, execute compiled code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "0"  # before tests/conftest.py asks for the interpreter


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulate", default="sm_80", help="the architecture that kernels are compiled for")
    parser.addoption("--seed", type=int, default=1, help="the order of programs and warps")


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest, poisoned_memory: None) -> Iterator[None]:
    from emulator.check import allowed_on_a_cpu
    from emulator.driver import Emulator
    from seqconv_triton.kernels.configs import assume, use_tables

    architecture, seed = (request.config.getoption(name) for name in ("--emulate", "--seed"))
    with allowed_on_a_cpu(), assume(architecture), use_tables(), Emulator(architecture, seed) as gpu:
        yield
    assert not gpu.errors, "\n".join(map(str, gpu.errors))

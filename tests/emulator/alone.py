"""A pytest plugin: every test runs on the emulator, and what the emulator finds fails it.

    python -m pytest -p emulator.alone --emulate sm_80 tests/test_kernels*.py

So the tests of single kernels, which the interpreter runs elsewhere, execute compiled code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "0"  # before tests/conftest.py asks for the interpreter


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulate", default="sm_80", help="the architecture that kernels are compiled for")
    parser.addoption("--seed", type=int, default=1, help="the order of programs and warps")
    parser.addoption("--share", default="0/1", help="i/n runs the i-th of every n cases of each test, at least one")
    parser.addoption("--record", help="a file that gets a line of JSON a test: launches, findings, kernels")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--share").split("/"))
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    items[:] = [item for cases in tests.values() for item in cases[part % len(cases) :: parts]]


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest, poisoned_memory: None) -> Iterator[None]:
    from emulator.check import allowed_on_a_cpu, float32_products
    from emulator.driver import Emulator
    from seqconv_triton.kernels.configs import assume, use_tables

    architecture, seed, record = map(request.config.getoption, ("--emulate", "--seed", "--record"))
    exact = float32_products("ieee")
    with exact, allowed_on_a_cpu(), assume(architecture), use_tables(), Emulator(architecture, seed) as gpu:
        yield
    if record:
        with open(record, "a", encoding="utf-8") as file:
            kernels = sorted({name for name, _ in gpu.results})
            json.dump({"counts": gpu.counts(), "findings": gpu.findings(), "kernels": kernels}, file)
            file.write("\n")
    assert not gpu.errors, "\n".join(map(str, gpu.errors))

"""The emulator's tests run in a process of their own, where Triton compiles: tests/test_emulator.py starts them.

By hand: `python -m pytest tests/emulator`.
"""

from __future__ import annotations

import os
import sys

import pytest

from emulator.build import NoCompiler, compiler

assert "triton" not in sys.modules, "pytest tests/emulator must be a run of its own: Triton is already here"
os.environ["TRITON_INTERPRET"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a C++ compiler nothing runs; on CI that is an error."""
    try:
        compiler()
    except NoCompiler as missing:
        if os.environ.get("CI") == "true":
            raise
        for item in items:
            item.add_marker(pytest.mark.skip(reason=str(missing)))

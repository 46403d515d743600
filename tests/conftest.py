"""Every test runs in deterministic mode: torch then fills uninitialised memory with NaN, so nothing unwritten hides.

`place` runs a test on the CPU, in Triton's interpreter and on a GPU, as far as the machine has them.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from helpers import exact_kernels
from interpreter import make_interpreter_fast
from slow import mark_slow

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses deterministic mode
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels then run on the CPU

collect_ignore = ["emulator"]  # in processes of their own, where Triton compiles: test_emulator.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow(items)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


PLACES = {"cpu": ("aten", "cpu"), "interpreter": ("triton", "cpu"), "gpu": ("triton", "cuda")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-model", action="store_true", help="export every model to ONNX, not a few")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    make_interpreter_fast()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def threads_put_back() -> Iterator[None]:
    """Where a command sets how many threads there are: on fewer cores, later tests would spend their time waiting."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu if name == "gpu" else ()) for name in PLACES])
def place(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of a place, with its backend in use."""
    import seqconv_triton as sct

    backend, device = PLACES[request.param]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if request.param == "interpreter" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with sct.use_backend(backend), exact_kernels() if device == "cuda" else nullcontext():
        yield torch.device(device)


@pytest.fixture
def timm() -> Iterator[ModuleType]:
    """timm with our models; what `timm_networks.shrink` changes is put back."""
    import timm

    import seqconv_triton.interop.timm as ours
    from seqconv_triton.interop.timm_network import TimmSeqResNetB22

    rows = TimmSeqResNetB22.rows
    yield timm
    TimmSeqResNetB22.rows = rows
    assert ours.__all__


@pytest.fixture
def triton_that_fences(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Configurations as with Triton 3.7.1 and later, whichever is installed: `heuristic.fences_copies`."""
    from seqconv_triton.kernels import heuristic

    heuristic.heuristic.cache_clear()
    monkeypatch.setattr(heuristic, "fences_copies", lambda: True)
    yield
    heuristic.heuristic.cache_clear()

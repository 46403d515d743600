"""The small cases under pytest-benchmark: `pytest tests/test_bench_small.py --benchmark-compare` and the like."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="extra: bench")

from typing import Any

from bench import contenders, subjects
from bench.cases import LAYERS, Case
from bench.timing import unmarked


@pytest.mark.parametrize("contender", ["reference eager", "ours eager"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", ["layer basic", "layer dense"])
def test_layer(benchmark: Any, name: str, training: bool, contender: str) -> None:
    assert name in LAYERS
    torch.use_deterministic_algorithms(False)  # else uninitialised memory is filled, and that is timed
    case = Case(name, training, 1, (contender,))
    base, shape = subjects.make(name, case.image)
    run = contenders.build(contender, case, base, subjects.random_input(shape, 1, torch.device("cpu"))).run
    benchmark.pedantic(run, (unmarked,), rounds=5, warmup_rounds=1)

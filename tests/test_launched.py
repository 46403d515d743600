"""What makes a stored result about kernels out of date, and what does not."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

from bench.launched import described, device_code, fingerprint
from seqconv_triton.kernels import statistics
from seqconv_triton.tools.ahead import Launch

LAUNCH = Launch(statistics.input_statistics_kernel, (("x_ptr", "*fp16"),), (("CHANNELS", 64),), (0,), (), 4, 3)


def test_code_of_a_kernel_is_that_of_all_it_calls() -> None:
    code = device_code(statistics.input_statistics_kernel)
    for name in ("input_statistics_kernel", "finish_statistics", "merged_statistics", "arrived_last", "aligned"):
        assert code.count(f"def {name}(") == 1
    assert "def finish_gradient(" not in code and "def run(" not in code
    assert "#" not in code and '"""' not in code


@pytest.mark.parametrize("called", ["finish_statistics", "arrived_last", "compiled_for_hip"])
def test_another_function_called_is_another_code(called: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = device_code.__wrapped__(statistics.input_statistics_kernel)
    monkeypatch.setattr(statistics, called, statistics.merged_sums)
    assert device_code.__wrapped__(statistics.input_statistics_kernel) != before


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": statistics.finish_gradient}, {"signature": (("x_ptr", "*bf16"),)}, {"constants": ()},
        {"divisible": ()}, {"small": (0,)}, {"num_warps": 8}, {"num_stages": 2},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_fingerprint_follows_all_of_a_launch(change: dict[str, object]) -> None:
    other = dataclasses.replace(LAUNCH, **change)
    assert fingerprint([described(other)]) != fingerprint([described(LAUNCH)])


def test_order_and_repetition_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(LAUNCH, num_warps=8)
    texts = [described(LAUNCH), described(other)]
    assert fingerprint(texts) == fingerprint([*reversed(texts), texts[0]])
    assert fingerprint(texts) != fingerprint(texts[:1]) and fingerprint(texts) != fingerprint(texts, "seed 1")
    before = fingerprint(texts)
    monkeypatch.setattr("bench.launched.version", lambda package: "3.0")
    assert fingerprint(texts) != before

"""Triton kernels against torch: the same bits whatever the order, and nothing to report."""

from __future__ import annotations

import pytest
import torch
import triton

from emulator.driver import Emulator
from emulator.reading import UNFENCED
from emulator.sample_kernels import (
    masked_add,
    product,
    random,
    run_last_arriver,
    run_pipeline,
    run_sums,
    strided_copy,
    tally,
)
from seqconv_triton.kernels.heuristic import fences_copies

SEEDS = (0, 1, 2)


@pytest.mark.parametrize("n", [1, 97, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_masked_add(n: int, dtype: torch.dtype) -> None:
    x, y = ((torch.randn(n) * 9).to(dtype) for _ in range(2))
    out = torch.full((n + 5,), 7, dtype=dtype)
    with Emulator(seed=1) as gpu:
        masked_add[(triton.cdiv(n, 128),)](x, y, out, n, BLOCK=128)
    assert torch.equal(out[:n], x + y) and (out[n:] == 7).all() and not gpu.reports
    assert gpu.counts()["stored"] == n * x.element_size()
    assert gpu.counts()["loaded"] == 2 * n * x.element_size()


def test_wide_and_narrow_loads() -> None:
    """Triton knows a stride of 64 to be a multiple of 16, and 51 not to be."""
    x = random(4 * 64 + 1024 + 8).half()
    loads = []
    for stride in (64, 51):
        out = torch.empty_like(x)
        with Emulator() as gpu:
            strided_copy[(4,)](x, out, stride, LENGTH=1024)
        assert not gpu.errors and torch.equal(out[: 3 * stride + 1024], x[: 3 * stride + 1024])
        loads.append(gpu.counts()["global"])
    assert loads[0] < loads[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_reduction(seed: int) -> None:
    gpu, distance = run_sums(seed)
    assert distance < 1e-5 and not gpu.errors


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(64, 64, 64), (37, 45, 51)], ids=str)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_product(architecture: str, kind: str, size: tuple[int, int, int], transposed: bool, stages: int) -> None:
    """On sm_90 tiles of 64 rows take wgmma, whose operands lie in shared memory."""
    rows = 64 if architecture == "sm_90" else 32
    m, n, k = size
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    a, b = random(m, k).to(dtype), random(k, n).to(dtype)
    exact = a.double() @ b.double()
    a = a.T.contiguous() if transposed else a
    outs = []
    for seed in SEEDS:
        c = torch.full((m, n), torch.nan)
        with Emulator(architecture, seed) as gpu:
            product[(triton.cdiv(m, rows), triton.cdiv(n, 32))](
                a, b, c, m, n, k, a.stride(0), n, n, BM=rows, BN=32, BK=32, P="tf32" if kind == "tf32" else "ieee",
                TRANSPOSED=transposed, num_stages=stages,
            )  # fmt: skip
        found = {report.finding for report in gpu.errors}
        assert not found or (found == {UNFENCED} and stages > 1 and architecture == "sm_90" and not fences_copies())
        assert (gpu.counts()["mma"] > 0) == (kind != "float32")
        outs.append(c)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert (outs[0].double() - exact).norm() / exact.norm() < (1e-3 if kind == "tf32" else 3e-7)


@pytest.mark.parametrize("late", [0, 1])
def test_copies_that_arrive_at_once_or_at_the_last_moment(late: int) -> None:
    gpu, error = run_pipeline(1, late=late)
    assert error < 3e-7 and not gpu.errors


def test_last_arriver_is_ordered_by_acquire_and_release() -> None:
    runs = [run_last_arriver(seed) for seed in range(6)]
    assert not any(gpu.errors for gpu, *_ in runs), runs[0][0].errors
    assert all(torch.equal(out, runs[0][1]) and (out - exact).abs() < 1e-4 for _, out, exact in runs)


def test_atomics() -> None:
    values = torch.randint(0, 9, (500,), dtype=torch.int32)
    counts, total = torch.zeros(10, dtype=torch.int32), torch.zeros(1)
    with Emulator(seed=4) as gpu:
        tally[(4,)](counts, values, total, 500, BLOCK=128)
    assert not gpu.errors and total.item() == 2 and counts[9] == 3
    assert torch.equal(counts[:9].long(), torch.bincount(values.long(), minlength=9))


def test_a_kernel_of_another_architecture_is_refused() -> None:
    """A compiled kernel that somebody kept must not run as if it were the active architecture's."""
    x, out = torch.ones(8), torch.empty(8)
    with Emulator("sm_80"):
        compiled = masked_add[(1,)](x, x, out, 8, BLOCK=128)
    with Emulator("sm_90"), pytest.raises(RuntimeError, match="compiled for"):
        compiled[(1, 1, 1)](x, x, out, 8, 128)

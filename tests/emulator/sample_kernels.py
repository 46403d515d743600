"""Small Triton kernels for the emulator's own tests, and what runs them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from emulator.driver import Emulator


@triton.jit
def masked_add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def strided_copy(x, out, stride, LENGTH: tl.constexpr):
    i = tl.program_id(0) * stride + tl.arange(0, LENGTH)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def overlapping_stores(out, DIFFER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)
    tl.store(out + i, tl.program_id(0) if DIFFER else 1)


@triton.jit
def colliding_stores(out, DIFFER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, i if DIFFER else i // 2)


@triton.jit
def column_sums(x, out, n, stride, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    j = tl.arange(0, BLOCK)
    rows = tl.load(x + tl.arange(0, ROWS)[:, None] * stride + j[None, :], mask=(j < n)[None, :], other=0.0)
    tl.store(out + j, tl.sum(rows, axis=0), mask=j < n)


@triton.jit
def tally(counts, values, total, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bucket = tl.load(values + i, mask=i < n, other=0)
    tl.atomic_add(counts + bucket, 1, mask=i < n)
    tl.atomic_add(total, 0.5)
    tl.atomic_max(counts + 9, tl.program_id(0))


@triton.jit
def last_arriver(x, partial, counter, out, n, SEM: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """The program that arrives last adds up what all have stored."""
    pid = tl.program_id(0)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial + pid, tl.sum(tl.load(x + i, mask=i < n, other=0.0)))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem=SEM) == tl.num_programs(0) - 1:
        t = tl.arange(0, TILES)
        tl.store(out, tl.sum(tl.load(partial + t, mask=t < tl.num_programs(0), other=0.0)))


@triton.jit
def product(
    a, b, c, M, N, K, sa, sb, sc, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """a [M, K] · b [K, N]; transposed, a is stored as [K, M]."""
    i, j = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        if TRANSPOSED:
            x = tl.trans(tl.load(a + k[:, None] * sa + i[None, :], mask=(k < K)[:, None] & (i < M)[None, :], other=0.0))
        else:
            x = tl.load(a + i[:, None] * sa + k[None, :], mask=(i < M)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.load(b + k[:, None] * sb + j[None, :], mask=(k < K)[:, None] & (j < N)[None, :], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=P)
    tl.store(c + i[:, None] * sc + j[None, :], acc, mask=(i < M)[:, None] & (j < N)[None, :])


@triton.jit
def scaled_product(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A dot whose left side is computed, and so lies in registers."""
    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(a + i[:, None] * K + k0 + k[None, :]).to(tl.float32) * 2
        acc = tl.dot(x.to(tl.float16), tl.load(b + (k0 + k)[:, None] * BN + j[None, :]), acc)
    tl.store(c + i[:, None] * BN + j[None, :], acc)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def run_sums(seed: int, **options: Any) -> tuple[Emulator, float]:
    """column_sums, and how far it is from torch."""
    x, out = random(64, 24), torch.empty(24)
    with Emulator(seed=seed, **options) as gpu:
        column_sums[(1,)](x, out, 24, 24, BLOCK=32, ROWS=64)
    return gpu, (out - x.sum(0)).abs().max().item()


def run_last_arriver(seed: int, sem: str = "acq_rel", **options: Any) -> tuple[Emulator, torch.Tensor, torch.Tensor]:
    """last_arriver, its sum and torch's."""
    x = random(1000)
    partial, counter, out = torch.full((8,), torch.nan), torch.zeros(1, dtype=torch.int32), torch.empty(1)
    with Emulator(seed=seed, **options) as gpu:
        last_arriver[(8,)](x, partial, counter, out, 1000, SEM=sem, BLOCK=128, TILES=8)
    assert counter.item() == 8
    return gpu, out, x.sum()


def run_pipeline(seed: int, **options: Any) -> tuple[Emulator, float]:
    """A product in three stages, and its relative error."""
    a, b, c = random(64, 96).half(), random(96, 64).half(), torch.empty(64, 64)
    with Emulator(seed=seed, **options) as gpu:
        product[(2, 2)](
            a, b, c, 64, 64, 96, 96, 64, 64, BM=32, BN=32, BK=32, P="ieee", TRANSPOSED=False, num_stages=3
        )  # fmt: skip
    exact = a.double() @ b.double()
    return gpu, ((c.double() - exact).norm() / exact.norm()).item()

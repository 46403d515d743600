"""Faults that must be found: an instruction taken out of a sound kernel, or a kernel that is wrong as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from emulator.driver import Emulator
from emulator.ptx import parse
from emulator.reading import REWRITTEN, UNDEFINED, UNFENCED, products_from_registers, read
from emulator.sample_kernels import (
    colliding_stores,
    masked_add,
    overlapping_stores,
    random,
    run_last_arriver,
    run_pipeline,
    run_sums,
    scaled_product,
    strided_copy,
)
from seqconv_triton.kernels.heuristic import fences_copies

SEEDS = (0, 1, 2)
BARRIER, WAIT = r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\d+;"


def without(pattern: str, which: int) -> Callable[[str, str], str]:
    """Takes one place that matches out of a kernel's text."""

    def change(name: str, ptx: str) -> str:
        start, end = [match.span() for match in re.finditer(pattern, ptx)][which]
        return ptx[:start] + ptx[end:]

    return change


def errors(gpu: Emulator) -> set[str]:
    """Beside what a Triton leaves out that does not fence copies in flight."""
    known = set() if fences_copies() else {UNFENCED}
    return {report.finding for report in gpu.errors} - known


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("which", [0, 1])
def test_missing_barrier_of_a_reduction(which: int, seed: int) -> None:
    assert "shared race (read/write)" in errors(run_sums(seed, change=without(BARRIER, which))[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_barriers_of_a_pipeline(seed: int) -> None:
    """Of the five that Triton places the first orders nothing: behind the loop, late copies of zeros are in flight."""
    noticed = [bool(run_pipeline(seed, change=without(BARRIER, which))[0].errors) for which in range(5)]
    assert noticed == [False, True, True, True, True]


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_wait_for_copies(seed: int) -> None:
    assert "shared bytes of a copy in flight" in errors(run_pipeline(seed, change=without(WAIT, 0))[0])


@pytest.mark.parametrize("seed", [1, 2])
def test_relaxed_atomic(seed: int) -> None:
    assert "global race (read/write)" in errors(run_last_arriver(seed, "relaxed")[0])


@pytest.mark.parametrize("seed", [1, 2])
def test_atomic_without_a_barrier_before_it(seed: int) -> None:
    def change(name: str, ptx: str) -> str:
        before, atomic, after = ptx.rpartition("atom.global")
        at = [match.span() for match in re.finditer(BARRIER, before)][-1]
        return before[: at[0]] + before[at[1] :] + atomic + after

    assert run_last_arriver(seed, change=change)[0].errors


def test_misaligned_vector() -> None:
    def change(name: str, ptx: str) -> str:
        return ptx.replace("+ 0 ];", "+ 6 ];", 1)

    x = random(4 * 64 + 1024 + 8).half()
    with Emulator(change=change) as gpu:
        strided_copy[(4,)](x, torch.empty_like(x), 64, LENGTH=1024)
    assert "global misaligned" in errors(gpu)


def test_out_of_bounds() -> None:
    x, y, out = torch.randn(100), torch.randn(100), torch.empty(100)
    with Emulator() as gpu:
        masked_add[(1,)](x, y, out, 101, BLOCK=128)
    assert errors(gpu) == {"global out of bounds"}
    assert all("lane 4" in str(report) for report in gpu.errors)


def test_guard_that_nothing_writes() -> None:
    x, y, out = torch.randn(128), torch.randn(128), torch.empty(128)
    for change in (None, lambda name, ptx: re.sub(r"@%p\d+ st\.global", "@%p0 st.global", ptx)):
        with Emulator(change=change) as gpu:
            masked_add[(1,)](x, y, out, 128, BLOCK=128)
        assert errors(gpu) == (set() if change is None else {UNDEFINED})


@pytest.mark.parametrize("differ", [True, False])
def test_stores_of_two_programs(differ: bool) -> None:
    with Emulator(seed=1) as gpu:
        overlapping_stores[(3,)](torch.full((512,), -1, dtype=torch.int32), differ, BLOCK=128)
    said = "global race (write/write)" if differ else "global write/write of one value"
    assert {report.finding for report in gpu.reports} == {said}


@pytest.mark.parametrize("differ", [True, False])
def test_stores_of_two_lanes(differ: bool) -> None:
    """Which of two lanes of one store wins is nowhere written."""
    with Emulator(seed=1) as gpu:
        colliding_stores[(1,)](torch.full((64,), -1, dtype=torch.int32), differ, BLOCK=128)
    assert errors(gpu) == ({"global store of two values by one instruction"} if differ else set())


@pytest.mark.parametrize(("stages", "block_k", "sound"), [(1, 32, True), (2, 16, True), (2, 32, False), (3, 64, False)])
def test_wgmma_on_registers_that_are_rewritten(stages: int, block_k: int, sound: bool) -> None:
    """Triton's issue 9433: the second product of a step may still read registers that the next step fills.

    It is noticed when it happens, and read from the text.
    """
    a, b, c = random(64, 256).half(), random(256, 32).half(), torch.empty(64, 32)
    texts: list[str] = []
    with Emulator("sm_90", hear=lambda launch: texts.append(launch.function.ptx)) as gpu:
        scaled_product[(1,)](a, b, c, 256, BM=64, BN=32, BK=block_k, num_stages=stages)
    exact = 2 * a.double() @ b.double()
    assert (c.double() - exact).norm() / exact.norm() < 1e-6
    assert errors(gpu) == (set() if sound else {REWRITTEN})
    kernel = parse(texts[0])
    assert products_from_registers(kernel) > 0
    assert {finding for finding, *_ in read(kernel)} == errors(gpu)

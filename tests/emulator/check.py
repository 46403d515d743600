"""One case in one dtype on one architecture: values against float64, the same bits for every seed, what was found.

The float64 reference differentiates at the very features that the kernels rounded and kept (tests/rounded.py): one near
ReLU's corner falls on either side of it as it is rounded, and moves a gradient by percents in any implementation.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from helpers import error, everything
from rounded import compare
from torch import Tensor, nn

import seqconv_triton as sct
from emulator.cases import DTYPES, Case
from emulator.driver import Emulator
from seqconv_triton.backend.triton import parts as backend
from seqconv_triton.kernels import replay
from seqconv_triton.kernels.configs import Table, assume, pin, use_tables
from seqconv_triton.kernels.heuristic import TWO_STAGES

# Relative RMS. TF32 truncates its operands, which alone costs a plain product 7.7e-4.
OUTPUT_LIMIT = {"fp16": 2e-3, "bf16": 1.6e-2, "tf32": 4e-3}
GRADIENT_LIMIT = {"fp16": 3e-3, "bf16": 2.4e-2, "tf32": 6e-3}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Outcome:
    """What came of a case: the largest relative RMS errors with their names, counts, and every complaint in words."""

    output: tuple[float, str] = (0.0, "")
    gradient: tuple[float, str] = (0.0, "")
    counts: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    kernels: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)


@contextmanager
def configured(case: Case, architecture: str, tables: Sequence[Table]) -> Iterator[None]:
    """Triton's backend with the tiles of a case for an architecture, where the case has none with those of `tables`."""
    with ExitStack() as stack:
        stack.enter_context(assume(architecture))
        stack.enter_context(use_tables(*tables))
        if case.tiles is not None:
            for family in TWO_STAGES:
                stack.enter_context(pin(family, case.tiles, case.tiles))
        stack.enter_context(sct.use_backend("triton"))
        yield


@contextmanager
def emulated(case: Case, architecture: str, seed: int, tables: Sequence[Table] = ()) -> Iterator[Emulator]:
    """Triton's backend on the emulator, configured by the heuristic but for what is in `tables`."""
    configuration = configured(case, architecture, tables)
    with Emulator(architecture, seed) as gpu, configuration, pytest.MonkeyPatch.context() as patch:
        replayable = replay.replayable

        def hear(tensors: list[Tensor]) -> bool:
            gpu.addressed = tensors
            return replayable(tensors)

        patch.setattr(replay, "replayable", hear)
        yield gpu


@contextmanager
def allowed_on_a_cpu() -> Iterator[None]:
    """CPU tensors pass the backend's checks, memory that nobody wrote is NaN, TF32 where `tf32`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "INTERPRETED", True)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        yield


@contextmanager
def float32_products(how: str) -> Iterator[None]:
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = how
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Conv weights in the dtype, BN in float32."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" not in name:
                parameter.data = parameter.data.to(dtype)
    return module


def check(
    case: Case, dtype_name: str, architecture: str, training: bool, seeds: Sequence[int], tables: Sequence[Table] = ()
) -> Outcome:
    """Execute a case, forward and backward, with every seed."""
    outcome = Outcome()
    dtype = DTYPES[dtype_name]
    module, x = cast(case.build(training), dtype), case.input(dtype)
    with sct.use_backend("reference"):
        exact = everything(copy.deepcopy(module).double(), x.double(), case.run)
    with allowed_on_a_cpu(), float32_products("tf32" if dtype_name == "tf32" else "ieee"):
        first: dict[str, Tensor] = {}
        for seed in seeds:
            with emulated(case, architecture, seed, tables) as gpu:
                got = everything(module, x, case.run)
                first = first or got
                compare_bits(outcome, first, got, f"seed {seeds[0]} and seed {seed}")
                if seed == seeds[-1]:
                    compare_bits(outcome, got, everything(module, x, case.run), "a first run and a replayed one")
                    if not gpu.by_address:
                        outcome.complaints.append("no launch was replayed")
            note(outcome, gpu)
        with emulated(case, architecture, seeds[-1], tables) as gpu, pytest.MonkeyPatch.context() as patch:
            torch.manual_seed(5)
            pairs = compare(copy.deepcopy(module), x, patch)
        note(outcome, gpu)
    values = {name: error(first[name], exact[name]) for name in exact if "running" in name or "output" in name}
    gradients = {name: error(*pair) for name, pair in pairs.items() if name != "output"}
    outcome.output, outcome.gradient = worst(values), worst(gradients)
    for (size, name), limit in ((outcome.output, OUTPUT_LIMIT), (outcome.gradient, GRADIENT_LIMIT)):
        if not size <= limit[dtype_name]:
            outcome.complaints.append(f"{name} is {size:.1e} from float64, and {limit[dtype_name]:.1e} is allowed")
    return outcome


def compare_bits(outcome: Outcome, a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    outcome.complaints += [f"{name} differs between {what}" for name in a if not same_bits(a[name], b[name])]


def note(outcome: Outcome, gpu: Emulator) -> None:
    outcome.counts.update(gpu.counts())
    outcome.findings.update(gpu.findings())
    outcome.kernels.update(name for name, _ in gpu.results)
    outcome.complaints += [str(report) for report in gpu.errors]


def worst(errors: dict[str, float]) -> tuple[float, str]:
    """The largest one and its name; NaN counts as the largest."""
    sizes = {name: float("inf") if e != e else e for name, e in errors.items()}
    return max((e, name) for name, e in sizes.items())


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))

"""What `make emulate` does, as tasks for several processes: each returns a row for results.py."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

import seqconv_triton as sct
from bench.launched import fingerprint
from emulator.cases import ARCHITECTURES, CASES, DTYPES
from emulator.check import check, float32_products
from emulator.configurations import Choices, listed, turns
from emulator.driver import ptx_alone
from emulator.mutations import record, shares
from emulator.ptx import parse
from emulator.reading import products_from_registers, read
from seqconv_triton.kernels import configs
from seqconv_triton.kernels.candidates import MOST, candidates
from seqconv_triton.kernels.configs import hear_keys
from seqconv_triton.tools import ahead

TESTS = Path(__file__).parent.parent
PARTS = ("cases", "configurations", "alone", "mutations", "wgmma")
ALONE = ("test_kernels.py", "test_kernels_backward.py")
MUTATED = ("basic-k8-many-tiles", "k8-s2-many-readers", "stage-k8-many-tiles")
MODELS = ("seqresnet_b42", "seqresnet_b22", "seqresnext_24")
SEEDS_OF_MUTATIONS = (1, 2, 3, 4, 5)


@dataclass
class Row:
    """What a task found."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)  # largest relative RMS of outputs and of gradients
    kernels: list[str] = field(default_factory=list)
    mutations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {size:.1e}" for name, size in self.errors.items())
        places = sum(share["places"] for share in self.mutations)
        silent = sum(len(share["silent"]) for share in self.mutations)
        noticed = f"{places - silent} of {places} mutations noticed" if places else ""
        counted = f"{self.counts['launches']} launches" if self.counts["launches"] else ""
        read = f"{self.counts['kernels_read']} kernels read" if self.counts["kernels_read"] else ""
        said = [*filter(None, [counted, errors, noticed, read]), f"{len(self.complaints)} complaints"]
        return f"{', '.join(said)} ({self.seconds:.0f} s)"


@dataclass(frozen=True)
class Task:
    """A row of a task counts as long as `code`, a fingerprint, is the same; made when it is asked for."""

    part: str
    architecture: str
    dtype: str
    case: str
    work: Callable[[], Row]
    stamp: Callable[[], str]

    @cached_property
    def code(self) -> str:
        return self.stamp()

    @property
    def name(self) -> str:
        return f"{self.part} {self.architecture} {self.dtype} {self.case}"


def all_tasks(seeds: int) -> list[Task]:
    tasks = []
    for architecture in ARCHITECTURES:
        for dtype in DTYPES:
            place = architecture, dtype
            tasks += [case_task(case, *place, seeds) for case in CASES]
        # float16 and bfloat16 have the same configurations: they take turns.
        for dtypes in (("fp16", "bf16"), ("tf32",)):
            for number, (case, choices) in enumerate(turns(CASES.values(), dtypes[0], architecture)):
                place = architecture, dtypes[number % len(dtypes)]
                turn = (0, 1 + number % 8)
                work = partial(run_case, case.name, *place, turn, choices, only_training=True)
                of = partial(stamp, case.name, *place, choices, turn)
                tasks.append(Task("configurations", *place, f"{case.name} {number}", work, of))
        for seed in range(1, 1 + seeds):
            tasks.append(alone_task(architecture, seed))
        for case in MUTATED:
            work = partial(run_mutations, case, architecture)
            place = architecture, "fp16"
            of = partial(stamp, case, *place, {}, SEEDS_OF_MUTATIONS)
            tasks.append(Task("mutations", *place, case, work, of))
    for model in MODELS:
        for dtype in DTYPES:
            work, of = partial(read_products, model, dtype), partial(fingerprint, kernel_texts())
            tasks.append(Task("wgmma", "sm_90", dtype, model, work, of))
    return tasks


def case_task(case: str, architecture: str, dtype: str, seeds: int) -> Task:
    """A case in training and evaluation, as the heuristic configures it."""
    work = partial(run_case, case, architecture, dtype, range(seeds))
    return Task("cases", architecture, dtype, case, work, partial(stamp, case, architecture, dtype, {}, seeds))


def stamp(case: str, architecture: str, dtype: str, choices: Choices, seeds: object) -> str:
    """The fingerprint of a case: itself, what it launches, and in which orders of programs."""
    return fingerprint(listed(CASES[case], dtype, architecture, choices).texts, CASES[case], seeds)


def alone_task(architecture: str, seed: int) -> Task:
    """The tests of single kernels."""
    tests = [(TESTS / name).read_text("utf-8") for name in (*ALONE, "kernel_operands.py")]
    of = partial(fingerprint, [*kernel_texts(), *tests])
    return Task("alone", architecture, "all", f"seed {seed}", partial(run_alone, architecture, seed), of)


@cache
def kernel_texts() -> list[str]:
    """All but what launches again: neither single kernels nor compilation meet it."""
    files = sorted(Path(configs.__file__).parent.glob("*.py"))
    return [file.read_text("utf-8") for file in files if file.name != "replay.py"]


def execute(tasks: Sequence[Task], jobs: int, deadline: float) -> Iterator[tuple[Task, Row]]:
    """Rows as they come. A task that raises is a complaint. None begins after the deadline (time.monotonic)."""
    # Processes begin anew: a forked one would share threads, and Triton's state, with this one. After some tasks they
    # end, since the emulator's memory grows, all at once: the pool's own max_tasks_per_child can wait for ever
    # (python/cpython#115634).
    share = 50 * jobs
    for first in range(0, len(tasks), share):
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(timed, task.work): task for task in tasks[first : first + share]}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
                if time.monotonic() > deadline:
                    pool.shutdown(cancel_futures=True)
                    return


def timed(work: Callable[[], Row]) -> Row:
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        row = work()
    except Exception as error:  # of whatever runs; the others' rows must not be lost
        row = Row(complaints=[f"{type(error).__name__}: {error}"])
    row.seconds = time.monotonic() - started
    return row


def run_case(
    case: str, architecture: str, dtype: str, seeds: Sequence[int], choices: Choices | None = None,
    only_training: bool = False,
) -> Row:  # fmt: skip
    row = Row()
    tables = () if choices is None else (choices,)
    for training in (True,) if only_training else (True, False):
        outcome = check(CASES[case], dtype, architecture, training, list(seeds), tables)
        row.counts.update(outcome.counts)
        row.findings.update(outcome.findings)
        row.complaints += outcome.complaints
        row.kernels += sorted(outcome.kernels - set(row.kernels))
        for name, (size, _) in {"output": outcome.output, "gradient": outcome.gradient}.items():
            row.errors[name] = max(size, row.errors.get(name, 0.0))
    row.counts["configurations"] = len(choices or ())
    return row


def run_alone(architecture: str, seed: int) -> Row:
    """The tests of single kernels."""
    row = Row()
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        lines.touch()
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "emulator.alone",
                "--emulate", architecture, "--seed", str(seed), "--record", str(lines),
                *(str(TESTS / name) for name in ALONE),
            ],
            env=os.environ | {"PYTHONPATH": str(TESTS)}, cwd=TESTS.parent, capture_output=True, text=True,
        )  # fmt: skip
        for line in lines.read_text("utf-8").splitlines():
            found = json.loads(line)
            row.counts.update(found["counts"])
            row.findings.update(found["findings"])
            row.counts["tests"] += 1
    if done.returncode:
        row.complaints.append(done.stdout[-3000:])
    return row


def run_mutations(case: str, architecture: str) -> Row:
    row = Row()
    for recording in record(CASES[case], "fp16", architecture):
        row.mutations += [vars(share) for share in shares(recording, architecture, SEEDS_OF_MUTATIONS)]
    return row


def read_products(model: str, dtype: str) -> Row:
    """The PTX of a model's launches for sm_90 is read, as the heuristic and as every candidate configure them."""
    row, network, seen = Row(), sct.create_model(model, device="meta"), set()
    with float32_products("tf32" if dtype == "tf32" else "ieee"), ptx_alone():
        with hear_keys() as heard:
            ahead.launches(network, 224, 32, DTYPES[dtype], "sm_90")
        choices = {key: candidates(key, "sm_90") for key in dict.fromkeys(heard)}
        for number in range(MOST):
            table = {key: own[number] for key, own in choices.items() if number < len(own)}
            for item in ahead.launches(network, 224, 32, DTYPES[dtype], "sm_90", tables=(table,)):
                if item in seen:
                    continue
                seen.add(item)
                kernel = parse(ahead.build(item, ahead.TARGETS["sm_90"]).asm["ptx"])
                row.counts.update(kernels_read=1, products_from_registers=products_from_registers(kernel))
                row.complaints += [f"{kernel.name}: {what} at {kernel.places[pc]}" for what, pc, _ in read(kernel)]
    return row

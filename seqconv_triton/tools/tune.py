"""`python -m seqconv_triton tune`: measure a model's kernel configurations on a GPU and keep what is faster."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import seqconv_triton as sct
from seqconv_triton.kernels import tables
from seqconv_triton.kernels.candidates import candidates
from seqconv_triton.kernels.configs import architecture, assume, reload_tables, use_tables
from seqconv_triton.kernels.heuristic import Key, LaunchConfig
from seqconv_triton.models.registry import create_model
from seqconv_triton.optional import require
from seqconv_triton.tools.arguments import DTYPES, add_model, images_of

if TYPE_CHECKING:
    from seqconv_triton.nn.layers import PackedSeqConv
    from seqconv_triton.tools.measure import Call, Outcome, Timer, Work

COMPILING = 0.7  # share of the time that compiling may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, batch=64, arch="for --dry-run ")
    parser.add_argument("--gpu", type=int, nargs="?", const=0, default=0, help="index of the GPU (default: 0)")
    parser.add_argument("--seconds", type=float, default=120.0, help="keys left after that stay (default: 120)")
    parser.add_argument("--dry-run", action="store_true", help="list keys and candidates, measure nothing; no GPU")
    parser.add_argument("--export", action="store_true", help="print the GPU's table as JSON, measure nothing")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """0; 1 if a kernel computed wrongly or the table could not be written; 2 where nothing can be measured."""
    if not arguments.seconds > 0:
        raise ValueError(f"--seconds ({arguments.seconds}) must be positive")
    require("tune", "triton", "triton")
    import triton

    if arguments.dry_run:
        return dry_run(arguments)
    if not torch.cuda.is_available():
        print("tune needs a GPU, and torch sees none (--dry-run lists what would be measured)", file=sys.stderr)
        return 2
    if not 0 <= arguments.gpu < torch.cuda.device_count():
        raise ValueError(f"--gpu ({arguments.gpu}) must be from 0 to {torch.cuda.device_count() - 1}")
    device = torch.device("cuda", arguments.gpu)
    gpu = torch.cuda.get_device_properties(device).name
    if arguments.export:
        rows = tables.read(tables.user_file(gpu), gpu)
        if not rows:
            print(f"nothing was tuned on {gpu} yet", file=sys.stderr)
            return 2
        print(tables.document(rows, gpu), end="")
        return 0
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: times of interpreted kernels mean nothing", file=sys.stderr)
        return 2
    with torch.cuda.device(device):
        return tune(arguments, device, gpu, gpu_timer)


def gpu_timer(run: Callable[[], object]) -> list[float]:
    """Quartiles of a run's milliseconds, by events, with the L2 cache emptied before each."""
    from triton.testing import do_bench

    quartiles: list[float] = do_bench(run, warmup=2, rep=10, quantiles=[0.25, 0.5, 0.75])
    return quartiles


def works_of(arguments: argparse.Namespace, arch: str) -> list[Work]:
    """The keys of the model that is named."""
    model = create_model(arguments.model, device="meta")
    return collect(model, images_of(arguments, model), DTYPES[arguments.dtype], arch)


def collect(model: torch.nn.Module, images: tuple[int, ...], dtype: torch.dtype, arch: str) -> list[Work]:
    """The keys of `model`, which is on the meta device, for images [N, C, H, W]; those that move most memory first.

    A training step has all keys of an evaluation. Of the stage with the largest tensors the middle call is taken:
    channels at both ends of a stage have fewer readers.
    """
    from seqconv_triton.tools.ahead import stage_inputs
    from seqconv_triton.tools.measure import Work

    found: dict[Key, Work] = {}
    with assume(arch):
        for stage, size in stage_inputs(model, images):
            for key, calls in _calls(stage, torch.empty(size, dtype=dtype, device="meta")).items():
                middle = len(calls) // 2
                work = Work(key, len(calls), stage, size, middle, calls[middle])
                if (known := found.get(key)) is not None:
                    largest = max(known, work, key=lambda work: work.call.bytes)
                    work = replace(largest, launches=known.launches + work.launches)
                found[key] = work
    return sorted(found.values(), key=lambda work: -work.launches * work.call.bytes)


def _calls(stage: PackedSeqConv, x: torch.Tensor) -> dict[Key, list[Call]]:
    """The tunable calls of a training step of one stage on the meta device, in their order; none is made."""
    from seqconv_triton.kernels.launch import listen, record
    from seqconv_triton.tools.ahead import stage_passes
    from seqconv_triton.tools.measure import Call, ignore

    noted: list[Call] = []
    found: dict[Key, list[Call]] = {}
    with listen(ignore), record(lambda *call: noted.append(Call(call[0], dict(call[1])))), torch.no_grad():
        for run_pass in stage_passes(stage, x, training=True):
            run_pass()
    for call in noted:
        if (key := call.key()) is not None:
            found.setdefault(key, []).append(call)
    return found


def dry_run(arguments: argparse.Namespace) -> int:
    works = works_of(arguments, arguments.arch)
    print(f"{arguments.model}, {arguments.dtype}, {arguments.arch}: {len(works)} keys, and the candidates of each:")
    print("pixels × outputs × reduction of a tile, w warps, s stages of loads; the heuristic's first")
    for work in works:
        print(f"\n{title(work.key)}; launches in a training step: {work.launches}")
        print("   ", "  ".join(map(short, candidates(work.key, arguments.arch))))
    print("\nNothing was measured.")
    return 0


def title(key: Key) -> str:
    return f"{key.kernel} of {key.reduction} × {key.taps} → {key.block_n}, {8 * key.element_size} bits"


def short(config: LaunchConfig) -> str:
    return f"{config.block_p}×{config.block_n}×{config.block_k} w{config.num_warps} s{config.num_stages}"


def tune(arguments: argparse.Namespace, device: torch.device, gpu: str, timer: Timer) -> int:
    """Measure, print a line a key, write the user's table."""
    from seqconv_triton.tools.measure import measure_stage

    arch, dtype = architecture(device), DTYPES[arguments.dtype]
    began = time.monotonic()
    works = works_of(arguments, arch)
    stages: dict[torch.nn.Module, list[Work]] = {}
    for work in works:
        stages.setdefault(work.stage, []).append(work)
    outcomes: list[Outcome] = []

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(f"{len(outcomes):>3} of {len(works)}  {line(outcome)}", flush=True)

    try:
        print(f"compiling the candidates of {len(works)} keys", flush=True)
        compile_ahead(works, arch, began + COMPILING * arguments.seconds)
        for part in stages.values():
            if time.monotonic() >= began + arguments.seconds:
                break
            try:
                measure_stage(part, dtype, device, timer, began + arguments.seconds, done)
            except torch.OutOfMemoryError:
                print("out of GPU memory: a smaller --batch measures the rest", file=sys.stderr)
    finally:  # also of what was measured before an interruption
        summary(outcomes, len(works), gpu)
        stored = store(outcomes, gpu, provenance(arguments))
    return 0 if stored and not any(outcome.wrong for outcome in outcomes) else 1


def compile_ahead(works: Iterable[Work], arch: str, deadline: float) -> None:
    """Compile all candidates into Triton's cache, in threads, until the deadline (of time.monotonic).

    What does not compile says so again when it is tried.
    """
    import triton

    from seqconv_triton.kernels.launch import listen
    from seqconv_triton.tools import ahead

    target = triton.runtime.driver.active.get_current_target()
    found: dict[ahead.Launch, None] = {}

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        found[ahead.describe(kernel, arguments)] = None

    with assume(arch), listen(note), torch.no_grad():
        for work in works:
            for config in candidates(work.key, arch):
                with use_tables({work.key: config}):
                    work.call.run()
    pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1))  # a compilation takes some 200 MB
    try:
        wait([pool.submit(ahead.build, launch, target) for launch in found], max(0.0, deadline - time.monotonic()))
    finally:
        pool.shutdown(cancel_futures=True)


def line(outcome: Outcome) -> str:
    if outcome.wrong:
        return f"{title(outcome.key)}: not measured, {outcome.wrong}"
    if outcome.config == outcome.heuristic:
        return f"{title(outcome.key)}: {short(outcome.config)} stays"
    old, new = outcome.heuristic_milliseconds, outcome.milliseconds
    change = f"{short(outcome.heuristic)} → {short(outcome.config)}"
    return f"{title(outcome.key)}: {change}  {old * 1e3:.1f} → {new * 1e3:.1f} µs  {old / new:.2f} ×"


def summary(outcomes: list[Outcome], keys: int, gpu: str) -> None:
    measured = [outcome for outcome in outcomes if not outcome.wrong]
    changed = sum(outcome.config != outcome.heuristic for outcome in measured)
    reasons = [reason.split(" by ")[0] for outcome in outcomes for reason in outcome.rejected.values()]
    counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    print(f"{gpu}: {len(measured)} of {keys} keys measured, {changed} changed; turned down: {counts or 'nothing'}")


def provenance(arguments: argparse.Namespace) -> dict[str, str]:
    import triton

    command = ["python", "-m", "seqconv_triton", "tune", arguments.model, "--dtype", arguments.dtype]
    command += ["--batch", str(arguments.batch)]
    if arguments.image_size is not None:
        command += ["--image-size", str(arguments.image_size)]
    return {
        "seqconv_triton": sct.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(command),
    }


def store(outcomes: Iterable[Outcome], gpu: str, source: dict[str, str]) -> bool:
    """Put what was measured in the place of what the user's table said before; where the heuristic's is best, nothing.

    False, and the new rows on the screen, where it cannot be written.
    """
    measured = [outcome for outcome in outcomes if not outcome.wrong]
    new = [row_of(outcome, source) for outcome in measured if outcome.config != outcome.heuristic]
    anew = [outcome.key._asdict() for outcome in measured]
    try:
        path = tables.user_file(gpu)
        try:
            old = tables.read(path, gpu)
        except ValueError as error:
            print(f"{error}; it is replaced", file=sys.stderr)
            old = []
        left = [row for row in old if row.get("key") not in anew]
        if not new and left == old:
            return True
        tables.write(path, gpu, [*left, *new])
    except OSError as error:
        print(f"the table could not be written ({error}); this is it:", file=sys.stderr)
        print(tables.document(new, gpu), end="")
        return False
    print(f"written to {path}")
    reload_tables()
    return True


def row_of(outcome: Outcome, source: dict[str, str]) -> dict[str, Any]:
    return {
        "key": outcome.key._asdict(),
        "config": outcome.config._asdict(),
        "milliseconds": outcome.milliseconds,
        "heuristic": outcome.heuristic._asdict(),
        "heuristic_milliseconds": outcome.heuristic_milliseconds,
        "provenance": source,
    }

"""`python -m seqconv_triton tune`: measure a model's kernel configurations on a GPU and keep what is faster."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

import seqconv_triton as sct
from seqconv_triton.kernels import tuning_tables
from seqconv_triton.kernels.configs import Key, LaunchConfig, architecture, assume, reload_tables
from seqconv_triton.kernels.tuning_candidates import candidates
from seqconv_triton.kernels.tuning_tables import Entry
from seqconv_triton.models.registry import create_model, list_models
from seqconv_triton.optional import require
from seqconv_triton.tools.kernels import ARCHITECTURES, DTYPES

if TYPE_CHECKING:
    from seqconv_triton.tools.tuning_calls import Work
    from seqconv_triton.tools.tuning_measure import Outcome

COMPILING = 0.7  # share of the time that compiling may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="seqresnet_b42", help="a model's name (default: seqresnet_b42)")
    parser.add_argument("--gpu", type=int, nargs="?", const=0, default=0, help="index of the GPU (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the features (default: bfloat16)")
    parser.add_argument("--batch", type=int, default=64, help="images to measure with (default: 64)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels to measure with (default: 224)")
    parser.add_argument("--seconds", type=float, default=120.0, help="keys left after that stay (default: 120)")
    parser.add_argument("--dry-run", action="store_true", help="list keys and candidates, measure nothing; no GPU")
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90", help="for --dry-run (default: sm_90)")
    parser.add_argument("--export", action="store_true", help="print the GPU's table as JSON, measure nothing")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """0; 1 if a kernel computed wrongly or the table could not be written; 2 where nothing can be measured."""
    for name in ("batch", "image_size", "seconds"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} ({getattr(arguments, name)}) must be positive")
    require("tune", "tune", "tqdm")
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
        entries = tuning_tables.read(tuning_tables.user_file(gpu), gpu)
        if not entries:
            print(f"nothing was tuned on {gpu} yet", file=sys.stderr)
            return 2
        print(tuning_tables.document(entries, gpu), end="")
        return 0
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: times of interpreted kernels mean nothing", file=sys.stderr)
        return 2
    with torch.cuda.device(device):
        return tune(arguments, device, gpu)


def works_of(arguments: argparse.Namespace, arch: str) -> list[Work]:
    """The keys of the model that is named."""
    from seqconv_triton.tools.tuning_calls import collect

    size = 32 if arguments.model in list_models("cifar_*") else arguments.image_size
    model = create_model(arguments.model, device="meta")
    return collect(model, (arguments.batch, 3, size, size), DTYPES[arguments.dtype], arch)


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


def tune(arguments: argparse.Namespace, device: torch.device, gpu: str) -> int:
    """Measure, print what changed, write the user's table."""
    arch = architecture(device)
    works = works_of(arguments, arch)
    outcomes: list[Outcome] = []
    try:
        measure_all(works, arguments, device, arch, outcomes)
    finally:  # also of what was measured before an interruption
        report(outcomes, len(works), gpu)
        stored = store(outcomes, gpu, provenance(arguments))
    return 0 if stored and not any(is_wrong(outcome) for outcome in outcomes) else 1


def measure_all(
    works: list[Work], arguments: argparse.Namespace, device: torch.device, arch: str, outcomes: list[Outcome]
) -> None:
    """Compile the contenders, then measure stage by stage; outcomes are appended as they come."""
    import triton
    from tqdm import tqdm

    from seqconv_triton.tools import tuning_measure
    from seqconv_triton.tools.tuning_calls import on_device

    began = time.monotonic()
    known: dict[Key, dict[LaunchConfig, str]] = {work.key: {} for work in works}
    total = sum(len(tuning_measure.contenders(work.key, arch)) for work in works)
    target = triton.runtime.driver.active.get_current_target()
    with assume(arch), tqdm(total=total, desc="compiling", unit="kernel", file=sys.stderr) as bar:
        for key, config, reason in tuning_measure.unusable(
            [work.call for work in works], arch, target, began + COMPILING * arguments.seconds
        ):
            bar.update()
            if reason:
                known[key][config] = reason
    timer = tuning_measure.gpu_timer(device)
    stages: dict[int, list[Work]] = {}
    for work in works:
        stages.setdefault(id(work.stage), []).append(work)
    with tqdm(total=len(works), desc="measuring", unit="key", file=sys.stderr) as bar:

        def measure_stage(own: list[Work]) -> None:
            for call in on_device(own, DTYPES[arguments.dtype], device):
                if time.monotonic() - began < arguments.seconds:
                    outcomes.append(tuning_measure.measure(call, arch, timer, known[call.key]))
                    bar.update()

        for own in stages.values():
            try:
                measure_stage(own)
            except torch.OutOfMemoryError:
                bar.write("out of GPU memory: a smaller --batch measures the rest", file=sys.stderr)


def is_wrong(outcome: Outcome) -> bool:
    from seqconv_triton.tools.tuning_measure import NO_TIME

    return outcome.wrong not in ("", NO_TIME)


def report(outcomes: list[Outcome], keys: int, gpu: str) -> None:
    """What changed, what was turned down, what is wrong."""
    changed = [outcome for outcome in outcomes if outcome.after != outcome.before]
    for o in sorted(changed, key=lambda outcome: outcome.key):
        old, new = o.milliseconds.get(o.before), o.milliseconds[o.after]
        gain = o.rejected[o.before] if old is None else f"{old * 1e3:.1f} → {new * 1e3:.1f} µs  {old / new:.2f} ×"
        print(f"{title(o.key):<50}{short(o.before):>22} → {short(o.after):<22}{gain:>30}")
    for o in outcomes:
        if is_wrong(o):
            print(f"{title(o.key):<50}not measured, {short(o.before)}: {o.wrong}")
    reasons = [reason.split(" by ")[0] for outcome in outcomes for reason in outcome.rejected.values()]
    counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    measured = sum(not outcome.wrong for outcome in outcomes)
    print(f"{gpu}: {measured} of {keys} keys measured, {len(changed)} changed; turned down: {counts or 'nothing'}")


def provenance(arguments: argparse.Namespace) -> dict[str, str]:
    import triton

    command = ["python", "-m", "seqconv_triton", "tune", arguments.model, "--dtype", arguments.dtype]
    command += ["--batch", str(arguments.batch), "--image-size", str(arguments.image_size)]
    return {
        "seqconv_triton": sct.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(command),
    }


def store(outcomes: Iterable[Outcome], gpu: str, source: dict[str, str]) -> bool:
    """Merge what changed into the user's table; False, and the table on the screen, where that cannot be written."""
    new = {
        o.key: Entry(o.after, o.milliseconds[o.after], o.before, o.milliseconds.get(o.before), source)
        for o in outcomes
        if o.after != o.before
    }
    if not new:
        return True
    try:
        path = tuning_tables.user_file(gpu)
        tuning_tables.update(path, gpu, new)
    except (OSError, RuntimeError) as error:
        print(f"the table could not be written ({error}); this is it:", file=sys.stderr)
        print(tuning_tables.document(new, gpu), end="")
        return False
    print(f"written to {path}")
    reload_tables()
    return True

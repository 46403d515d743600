"""Every GPU case without a GPU: its launches, their rooflines, on request its kernels compiled; no time is claimed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import seqconv_triton as sct
from bench.cases import MODELS, Case
from bench.contenders import DTYPES
from bench.predict import case_work
from bench.report import milliseconds
from bench.roofline import countable, families, for_products_of, predicted
from seqconv_triton.tools.ceilings import GPUS, Ceilings, Gpu
from seqconv_triton.tools.cost import Work

COLUMNS = ("arithmetic", "bytes", "roofline", "issue", "floor")


def case_lines(case: Case, gpu: Gpu, architecture: str | None) -> Iterable[str]:
    """A line a part, and for whole models one a kernel family."""
    counted = architecture if architecture and countable(architecture) else None
    ceilings = for_products_of(DTYPES[case.dtype], gpu)
    for part, works in case_work(case, architecture or "sm_90").items():
        yield line(case.name, part, works, ceilings, counted)
        if case.subject in sct.list_models():
            for family, own in families(works):
                yield line("", family, own, ceilings, counted)


def line(name: str, part: str, works: list[Work], ceilings: Ceilings, architecture: str | None) -> str:
    seconds = predicted(works, ceilings, architecture)
    times = [f"{milliseconds(seconds[key])} ms" if (key := f"{what}_seconds") in seconds else "" for what in COLUMNS]
    return f"{name:<80}{part:<22}{len(works):>9}{''.join(f'{time:>13}' for time in times)}  not measured"


def dry_run(cases: Sequence[Case], architecture: str | None = None) -> int:
    """Print every case's prediction; with an architecture compile every distinct kernel of the models, or fail.

    Its machine code then adds the issue slots' time. Returns 1 if a kernel spills or does not fit the GPU's shared
    memory, else 0.
    """
    if architecture is not None:
        known(architecture)
    gpu = GPUS.get(architecture or "sm_90", GPUS["sm_90"])
    print(f"ceilings assumed: {gpu}; stages only, no stem, no classifier")
    print(f"{'case':<80}{'part':<22}{'launches':>9}{''.join(f'{what:>13}' for what in COLUMNS)}  measured")
    seen: set[tuple[object, ...]] = set()
    for case in cases:
        key = (case.subject, case.training, case.batch, case.dtype)
        if key not in seen:
            seen.add(key)
            for text in case_lines(case, gpu, architecture):
                print(text, flush=True)
    return compile_all({case.subject for case in cases}, architecture) if architecture else 0


def known(architecture: str) -> None:
    from seqconv_triton.tools.ahead import TARGETS

    if architecture not in TARGETS:
        raise SystemExit(f"unknown architecture {architecture!r} (known: {', '.join(TARGETS)})")


def compile_all(subjects: set[str], architecture: str) -> int:
    """Ahead-of-time compilation of every kernel of the models among the subjects, in bfloat16."""
    from seqconv_triton.tools.ahead import SHARED_LIMIT, compile_launch, launches

    bad = 0
    for name in MODELS:
        if name not in subjects:
            continue
        model = sct.create_model(name, device="meta")
        found = launches(model, 224, 256, DTYPES["bfloat16"], architecture)
        for item in found:
            result = compile_launch(item, architecture)
            fits = result.shared <= SHARED_LIMIT[architecture] and not result.spills
            bad += not fits
            print(
                f"{name:<16}{item.name:<22}{result.registers:>5} registers{result.spills:>4} spilled"
                f"{result.shared:>8} bytes shared  {result.instruction:<8}{result.occupancy:>5.0%} occupancy",
                flush=True,
            )
        print(f"{name}: {len(found)} kernels compiled for {architecture}", flush=True)
    return int(bad > 0)

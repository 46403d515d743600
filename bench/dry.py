"""Every GPU case without a GPU: its launches, their rooflines, on request its kernels compiled; no time is claimed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import seqconv_triton as sct
from bench.cases import MODELS, Case
from bench.ceilings import H200
from bench.contenders import DTYPES
from bench.predict import case_work
from bench.report import milliseconds
from bench.roofline import Work, families, predicted


def case_lines(case: Case) -> Iterable[str]:
    """A line a part, and for whole models one a kernel family."""
    for part, works in case_work(case).items():
        yield line(case.name, part, works)
        if case.subject in sct.list_models():
            for family, found in families(works):
                yield line("", family, found)


def line(name: str, part: str, works: list[Work]) -> str:
    p = predicted(works, H200)
    times = "".join(f"{milliseconds(p[f'{what}_seconds']):>10} ms" for what in ("arithmetic", "bytes", "roofline"))
    return f"{name:<76}{part:<22}{len(works):>9}{times}  not measured"


def dry_run(cases: Sequence[Case], architecture: str | None = None) -> int:
    """Print every case's prediction; with an architecture compile every distinct kernel of the models, or fail.

    Returns 1 if a kernel spills or does not fit the GPU's shared memory, else 0.
    """
    print(
        f"ceilings assumed: copy {H200.bytes_per_second / 1e12:g} TB/s, bfloat16 matrix product "
        f"{H200.operations_per_second / 1e12:g} TFLOP/s (an H200, measured once); stages only, no stem, no classifier"
    )
    print(f"{'case':<76}{'part':<22}{'launches':>9}{'arithmetic':>13}{'bytes':>13}{'roofline':>13}  measured")
    seen: set[tuple[object, ...]] = set()
    for case in cases:
        key = (case.subject, case.training, case.batch, case.dtype)
        if key not in seen:
            seen.add(key)
            for text in case_lines(case):
                print(text, flush=True)
    return compile_all({case.subject for case in cases}, architecture) if architecture else 0


def compile_all(subjects: set[str], architecture: str) -> int:
    """Ahead-of-time compilation of every kernel of the models among the subjects, in bfloat16."""
    from seqconv_triton.tools.ahead import SHARED_LIMIT, TARGETS, compile_launch, launches

    if architecture not in TARGETS:
        raise SystemExit(f"unknown architecture {architecture!r} (known: {', '.join(TARGETS)})")
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

"""Results for the eye: a table that grows case by case, with a progress bar below it."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from bench.cases import Case
from bench.results import Row

HEADER = (
    f"{'part':<9}{'contender':<26}{'median':>10}{'[quartiles]':>20}{'speed':>8}{'images/s':>10}{'peak':>10}"
    f"{'kept/image':>12}{'roofline':>10}{'floor':>7}"
)
BASE = "reference eager"


def milliseconds(seconds: float) -> str:
    """With three significant digits, as ms."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def speed(row: Row, base: Row | None) -> float | None:
    """How many times as fast as `base`: median over the rounds that both ran one after the other."""
    if base is None or not row.get("seconds") or not base.get("seconds"):
        return None
    return statistics.median(a / b for a, b in zip(base["seconds"], row["seconds"], strict=False))


def mebibytes(count: float | None) -> str:
    if not count:
        return ""
    value = count / 2**20
    return f"{value:.0f} MiB" if value >= 10 else f"{value:.1f} MiB"


def line(row: Row, base: Row | None) -> str:
    start = f"{row['part']:<9}{row['contender']:<26}"
    for reason in ("wrong", "failed", "not_measured"):
        if reason in row:
            return f"{start}{reason.replace('_', ' ')}: {row[reason]}"
    quartiles = f"[{milliseconds(row['lower'])}, {milliseconds(row['upper'])}]"
    ratio = speed(row, base)
    shares = [
        f"{row[name] / row['median']:.0%}" if name in row else "" for name in ("roofline_seconds", "floor_seconds")
    ]  # fmt: skip
    text = (
        f"{start}{milliseconds(row['median']):>7} ms{quartiles:>20}{'' if ratio is None else f'{ratio:.2f} ×':>8}"
        f"{row['batch'] / row['median']:>10.4g}{mebibytes(row.get('peak_bytes')):>10}"
        f"{mebibytes(row.get('kept_bytes', 0) / row['batch']):>12}"
        f"{shares[0]:>10}{shares[1]:>7}"
    )
    if "compile_seconds" in row:
        text += f"  compiled in {row['compile_seconds']:.0f} s, {row['caches']}"
    return text.rstrip()


def table(case: Case, rows: list[Row]) -> str:
    bases = {row["part"]: row for row in rows if row["contender"] in (BASE, "torch plain")}
    order = {"forward": 0, "backward": 1}
    rows = sorted(rows, key=lambda row: order.get(row["part"], 2))
    return "\n".join([f"\n{case.name}", HEADER, *(line(row, bases.get(row["part"])) for row in rows)])


@contextmanager
def progress(cases: list[Case]) -> Iterator[Iterable[Case]]:
    """The cases, with a bar on a terminal's last line that names the running one; plain without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield cases
        return
    bar = tqdm(cases, unit="case", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def named() -> Iterator[Case]:
        for case in bar:
            bar.set_description(case.name)
            yield case

    with bar:
        yield named()


def say(text: str) -> None:
    """Print above the progress bar, at once."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(text, flush=True)
    else:
        tqdm.write(text)
        sys.stdout.flush()


def show(case: Case, rows: list[Row]) -> None:
    say(table(case, rows))


def heading(contents: dict[str, Any]) -> str:
    """Machine, versions and ceilings, on two lines."""
    source = contents["provenance"]
    text = "  ".join(f"{key} {value}" for key, value in source.items())
    if found := contents.get("ceilings"):
        text += (
            f"\nmeasured ceilings: copy {found['bytes_per_second'] / 1e9:.4g} GB/s, matrix product "
            f"{found['operations_per_second'] / 1e9:.4g} GFLOP/s"
        )
    return text + (
        "\nspeed: times as fast as the eager concatenating reference; roofline: share of the ceilings' speed; "
        "floor: the same with the GPU's issue slots"
    )

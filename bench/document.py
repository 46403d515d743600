"""`python -m bench document`: the measured parts of README and docs, written from the results files, or checked.

A part stands between `<!-- bench: NAME -->` and `<!-- bench: end -->`. Nobody types a figure there:
tests/test_document.py fails when a part is not what the results files say.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import bounds, compilation, compiled, floors, halves, launches
from bench.cases import FIRST
from bench.results import FOLDER, Row, load, read_json
from bench.summary import again, faster, networks
from bench.tables import cases_of, goals_table, losses, machine, peers_table, processor_of, ratio_table, times
from seqconv_triton.tools.ceilings import GPUS

ROOT = Path(__file__).parent.parent
EXECUTED = ROOT / "docs" / "results" / "emulation.json"
DOCUMENTS = ("README.md", "docs/performance.md", "bench/results/README.md", "bench/results/cases.md")
PART = re.compile(r"(<!-- bench: (?P<name>\w+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)

# Rows of the README's table, of SeqResNet-B42: text, results file, part, batch, dtype.
README_ROWS = (
    ("evaluation, 8 images", "cpu", "eval", 8, "float32"),
    ("training step, 4 images", "cpu", "step", 4, "float32"),
    ("evaluation, 8 images, bfloat16", "cpu-bf16", "eval", 8, "bfloat16"),
)
Contents = dict[str, Any]


def results(name: str) -> Contents | None:
    path = FOLDER / f"{name}.json"
    return load(path) if path.exists() else None


def runs_of(name: str) -> list[Contents]:
    """The newest results of a CPU table, and behind them those on other processors: `NAME-on-….json`."""
    newest = results(name)
    if newest is None:
        return []
    others = [load(path) for path in sorted(FOLDER.glob(f"{name}-on-*.json"))]
    return [newest, *(run for run in others if machine(run) != machine(newest))]


def measured() -> str:
    """The README's table: what was counted and what was timed, the better of every two in bold; GPUs' floors."""
    runs = runs_of("cpu")
    if not runs:
        return "Not measured yet: `make bench` writes this table.\n"
    lines = ["| SeqResNet-B42 | concatenating code | seqconv_triton |", "| --- | --- | --- |"]
    if counts := runs[0].get("counts", {}).get(FIRST):
        theirs, ours = (counts[key] / 2**20 for key in ("kept_bytes_reference", "kept_bytes"))
        lines.append(f"| kept for backward per 224² image, float32 | {theirs:.0f} MiB | **{ours:.0f} MiB** |")
    for text, file, part, batch, dtype in README_ROWS:
        for run in runs_of(file):
            lines += sides(f"{processor_of(run)}, {text}", run, part, batch, dtype)
    gpu, counted = results("gpu"), read_json(floors.FILE)
    text = (
        "Two CPU threads of shared machines; medians of interleaved runs; float32 unless said otherwise, channels_last."
    )
    bounds_of: dict[str, list[str]] = {}
    for what, mode, part in (("evaluation", "eval", "eval"), ("training step", "train", "step")):
        case = f"{what}, {floors.BATCH} images, bfloat16"
        if gpu and (found := sides(f"{gpu['provenance']['gpu']}, {case}", gpu, part, floors.BATCH, "bfloat16")):
            lines += found
        elif counted is not None:
            for name in (FIRST, "resnet50", "resnet152"):
                bounds_of.setdefault(name, []).append(f"{1e3 * floors.seconds(counted, name, mode):.1f}")
            lines.append(
                f"| {GPUS[floors.ARCHITECTURE].name}, {case}, not measured | – | ≥ {bounds_of[FIRST][-1]} ms |"
            )
    if bounds_of:
        smaller, larger = (" and ".join(bounds_of[name]) for name in ("resnet50", "resnet152"))
        text += (
            f" Not measured: the least that our stages' machine code allows (`python -m bench floors`); memory and "
            f"arithmetic alone allow a whole ResNet-50 {smaller} ms, a ResNet-152 {larger} ms."
        )
    return "\n".join(lines) + f"\n\n{textwrap.fill(text, 120)}\n"


def sides(what: str, run: Contents, part: str, batch: int, dtype: str) -> list[str]:
    """B42's row of the README's table, if both sides were timed."""
    rows = cases_of(run).get((FIRST, part, batch, dtype), {})
    own = {name: row for name, row in rows.items() if name.endswith((" eager", " compiled"))}
    if not any(name.startswith("reference ") for name in own) or not any(name.startswith("ours ") for name in own):
        return []
    return [f"| {what} | {times(own, 'reference', 'ours')} | {times(own, 'ours', 'reference')} |"]


def status() -> str:
    """What README says of GPUs."""
    if (gpu := results("gpu")) is None:
        text = (
            "**No GPU has run the Triton kernels yet**: times on a GPU, drivers and several GPUs are not proven, and "
            "`make gpu` is the command that will. "
        )
        if (found := read_json(EXECUTED)) is not None:
            text += executed(found)
        return textwrap.fill(f"{text}Models, layers, training and the CPU backend are tested.", 120) + "\n"
    source = gpu["provenance"]
    return f"The Triton kernels were tested and measured on one {source['gpu']} ({source['date']}), not on several.\n"


def executed(found: Contents) -> str:
    """How often compiled kernels were executed without a GPU, and what was found."""
    launches, instructions = (
        sum(group.get(what, 0) for group in found["groups"]) for what in ("launches", "instructions")
    )
    kinds = ("races", "misaligned", "out of bounds", "other errors")
    races, misaligned, stray, other = (sum(group[kind] for group in found["groups"]) for kind in kinds)
    wrong, missing = len(found["complaints"]), found["tasks"] - found["finished"]
    others = f"{other} other errors" + (f", {wrong} complaints" if wrong else "")
    if missing:
        others += f", {missing} of {found['tasks']} tasks not run"
    return (
        f"Their compiled code was executed on a CPU instead, thread by thread: {launches:,} launches, {instructions:,} "
        f"warp instructions, {races} races, {misaligned} misaligned accesses, {stray} out of bounds, {others} "
        f"({found['date']}). "
    )


def peers() -> str:
    """The README's table of other networks, from the CPU run that had them."""
    contents = results("cpu-full")
    if contents is None:
        return "Not measured yet: `python -m bench run --full` with timm or torchvision.\n"
    table = peers_table(contents, best_only=True)
    return f"{table}\n{caption(contents)} Rows of bench/results/cpu-full.json.\n"


def caption(contents: Contents) -> str:
    source = contents["provenance"]
    own = "each contender in processes of its own, " if source.get("processes") == "own" else ""
    dtypes = " and ".join(dict.fromkeys(row["dtype"] for row in contents.get("rows", [])))
    return textwrap.fill(
        f"CPU times: medians of interleaved rounds of one run, {own}{source['threads']} threads on a shared "
        f"{machine(contents)} with {source['vectors']}, {dtypes or 'float32'}, channels_last, "
        f"torch {source['torch']}, {source['date']}, revision {source['revision']}.",
        width=120,
    )


def summary() -> str:
    """The goals, whole networks, and what is faster."""
    runs = runs_of("cpu")
    if not runs:
        return "Not measured yet: `make bench` writes this part.\n"
    full = results("cpu-full")
    found = [*runs, *([full] if full else [])]
    parts = [goals_table(*found), again(runs_of("cpu-bf16")), networks(runs), *map(failures, runs)]
    return "\n".join(filter(None, parts))


def bfloat16() -> str:
    runs = runs_of("cpu-bf16")
    if not runs:
        return "Not measured yet: `python -m bench run --cases cpu-bf16` writes this part.\n"
    return "\n".join(filter(None, [goals_table(*runs), halves.side_by_side(runs), *map(failures, runs)]))


def lost() -> str:
    """What is faster than ours in any CPU run, and what those runs were."""
    full = results("cpu-full")
    runs = [*runs_of("cpu"), *runs_of("cpu-bf16"), *([full] if full else [])]
    return "\n".join([faster(runs), *(f"{caption(run)}\n" for run in runs)])


def all_halves() -> str:
    """All cases of the runs in two precisions, and where ours loses."""
    parts = []
    for run in runs_of("cpu-bf16"):
        parts += [f"{caption(run)}\n", halves.markdown(run)]
        for dtype in ("bfloat16", "float32"):
            parts.append(f"In {dtype}. " + losses({"rows": [row for row in run["rows"] if row["dtype"] == dtype]}))
    return "\n".join(parts) or "Not measured yet: `python -m bench run --cases cpu-bf16` writes this part.\n"


def failures(contents: Contents) -> str:
    """What was wrong or failed; nothing where nothing was."""
    rows = [row for row in contents["rows"] if "wrong" in row or "failed" in row]
    return missing({"rows": rows}) if rows else ""


def cpu(name: str = "cpu", command: str = "make bench") -> str:
    """All cases of a CPU run, then the peers, where ours loses, and what was not measured; on every processor."""
    found = map(all_cases, runs_of(name))
    return "\n".join(found) or f"Not measured yet: `{command}` writes this part.\n"


def all_cases(contents: Contents) -> str:
    text = caption(contents)
    if ceilings := contents.get("ceilings"):
        text += (
            f" Measured ceilings: copy {ceilings['bytes_per_second'] / 1e9:.1f} GB/s, "
            f"matrix product {ceilings['operations_per_second'] / 1e9:.0f} GFLOP/s."
        )
    if "seconds" in contents:
        text += f" The whole run took {contents['seconds'] / 60:.1f} minutes."
    return f"{text}\n\n{whole(contents)}"


def gpu() -> str:
    """The goals, and all cases, of the GPU run."""
    contents = results("gpu")
    if contents is None:
        return "Not measured: no run on a GPU has been committed. `make gpu` writes bench/results/gpu.json.\n"
    source = contents["provenance"]
    text = f"{source.get('gpu')}, torch {source['torch']}, triton {source['triton']}, {source['date']}."
    return f"{text}\n\n{whole(contents)}"


def whole(contents: Contents) -> str:
    """Every table of a results file."""
    tables = (goals_table, ratio_table, bounds.markdown, peers_table, losses, missing)
    return "\n".join(text for table in tables if (text := table(contents)))


def missing(contents: Contents) -> str:
    """Rows without a time, by reason; a wrong result is one."""
    reasons: dict[str, list[Row]] = {}
    for row in contents["rows"]:
        for kind in ("wrong", "failed", "not_measured"):
            if kind in row:
                reasons.setdefault(f"{kind.replace('_', ' ')}: {row[kind]}", []).append(row)
    lines = [
        f"- {', '.join(sorted({row['contender'] for row in rows}))} — {reason}" for reason, rows in reasons.items()
    ]
    lines += [f"- {note}" for note in contents.get("notes", [])]
    return "Without a time:\n\n" + "\n".join(lines) + "\n" if lines else "Every contender has a time.\n"


PARTS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "bfloat16": bfloat16,
    "lost": lost,
    "halves": all_halves,
    "compile": lambda: compilation.markdown(read_json(compilation.FILE)),
    "floors": lambda: floors.markdown(read_json(floors.FILE)),
    "compiled": lambda: compiled.markdown(read_json(compiled.FILE)),
    "launches": lambda: launches.markdown(read_json(launches.FILE)),
    "measured": measured,
    "status": status,
    "peers": peers,
    "cpu": cpu,
    "cpu_full": partial(cpu, "cpu-full", "python -m bench run --full"),
    "gpu": gpu,
}


def rewritten(text: str) -> str:
    """A document with its parts as the results files say. Raises KeyError for an unknown part."""
    return PART.sub(lambda found: found.group(1) + PARTS[found["name"]]() + found.group(3), text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a part is out of date")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    stale = 0
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text()
        after = rewritten(before)
        if before == after:
            print(f"{name}: up to date")
        elif arguments.check:
            stale += 1
            print(f"{name}: not what bench/results says (python -m bench document)", file=sys.stderr)
        else:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(after)
            temporary.replace(path)
            print(f"{name}: written")
    return int(stale > 0)

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

from bench import bounds
from bench.results import FOLDER, Row, load, timed
from bench.tables import goals_table, losses, peers_table, ratio_table, times

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "bench/results/README.md")
PART = re.compile(r"(<!-- bench: (?P<name>\w+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)

# Rows of the README's table: text, subject, part, batch.
README_ROWS = (
    ("CPU, evaluation, 8 images", "seqresnet_b42", "eval", 8),
    ("CPU, evaluation, 1 image", "seqresnet_b42", "eval", 1),
    ("CPU, training step, 4 images", "seqresnet_b42", "step", 4),
    ("CPU, SeqResNet-B22, evaluation, 8 images", "seqresnet_b22", "eval", 8),
    ("CPU, SeqResNet-B22, training step, 4 images", "seqresnet_b22", "step", 4),
    ("CPU, SeqResNeXt-24, evaluation, 8 images", "seqresnext_24", "eval", 8),
)
Contents = dict[str, Any]


def results(name: str) -> Contents | None:
    path = FOLDER / f"{name}.json"
    return load(path) if path.exists() else None


def measured() -> str:
    """The README's table: what was counted and what was timed, the faster of every two in bold."""
    contents = results("cpu")
    if contents is None:
        return "Not measured yet: `make bench` writes this table.\n"
    lines = [
        "| SeqResNet-B42, measured | concatenating code | seqconv_triton | row of bench/results/cpu.json |",
        "| --- | --- | --- | --- |",
    ]
    if counts := contents.get("counts", {}).get("seqresnet_b42"):
        theirs, ours = (counts[key] / 2**20 for key in ("kept_bytes_reference", "kept_bytes"))
        lines.append(
            f"| kept for backward per 224² image, float32 | {theirs:.0f} MiB | **{ours:.0f} MiB** | "
            "counts, seqresnet_b42 |"
        )
        lines.append(
            f"| parameter tensors | {counts['published_parameter_tensors']:,} (the published layout) | "
            f"**{counts['parameter_tensors']}** | counts, seqresnet_b42 |"
        )
    rows = list(timed(contents["rows"]).values())
    for text, subject, part, batch in README_ROWS:
        own = {r["contender"]: r for r in rows if (r["subject"], r["part"], r["batch"]) == (subject, part, batch)}
        if "reference eager" not in own or "ours eager" not in own:
            continue
        lines.append(
            f"| {text} | {times(own, 'reference', 'ours')} | {times(own, 'ours', 'reference')} | "
            f"{subject}, {part}, {batch} |"
        )
    return "\n".join(lines) + f"\n\n{caption(contents)}\n"


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
    return textwrap.fill(
        f"CPU times: medians of interleaved rounds of one run, {own}{source['threads']} threads on a shared "
        f"{source['processor']} with {source['vectors']}, float32, channels_last, torch {source['torch']}, "
        f"{source['date']}, revision {source['revision']}.",
        width=120,
    )


def cpu(name: str = "cpu", command: str = "make bench") -> str:
    """All cases of a CPU run, then the peers, where ours loses, and what was not measured."""
    contents = results(name)
    if contents is None:
        return f"Not measured yet: `{command}` writes this part.\n"
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
    "measured": measured,
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

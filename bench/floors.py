"""`python -m bench floors`: what passes of the ImageNet networks take at least on a GPU, by their machine code.

Into bench/results/floors.json, from which README and docs/performance.md take their figures. No GPU is needed, and some
minutes for the compiler. What a floor and a roofline are: `seqconv_triton/tools/cost.py` and `peers.py`.
"""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, Any

import torch

import seqconv_triton as sct
from bench.cases import MODELS
from bench.launched import described, fingerprint
from bench.report import say
from bench.results import FOLDER, Row, provenance, write_json
from seqconv_triton.tools import peers
from seqconv_triton.tools.ceilings import GPUS

if TYPE_CHECKING:
    from seqconv_triton.tools.instructions import Anatomy

ARCHITECTURE, BATCH, IMAGE = "sm_90", 256, 224
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  # the last as TF32
FILE = FOLDER / "floors.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the file has one form."""


def run_from_arguments(_: argparse.Namespace) -> int:
    say(f"{ARCHITECTURE}, {BATCH} images of {IMAGE}²")
    anatomies: dict[str, Any] = {}
    cases = itertools.product(DTYPES, MODELS, ("eval", "train"))
    rows = [*(ours(*case, anatomies) for case in cases), *theirs()]
    source = provenance(torch.device("cpu"))
    contents = {
        "provenance": {name: source[name] for name in ("torch", "triton", "date", "revision")},
        "architecture": ARCHITECTURE, "batch": BATCH, "image": IMAGE, "rows": rows,
        "anatomies": dict(sorted(anatomies.items())),
    }  # fmt: skip
    write_json(FILE, contents)
    say(f"written: {FILE}")
    return 0


def ours(dtype: str, name: str, mode: str, anatomies: dict[str, Any]) -> Row:
    """A row of one of our networks, of all launches of its stages; what was counted of each goes into `anatomies`."""
    from seqconv_triton.tools.cost import model_work, total
    from seqconv_triton.tools.instructions import of_launch

    model = sct.create_model(name, device="meta")
    works = model_work(model, (BATCH, 3, IMAGE, IMAGE), DTYPES[dtype], mode == "train", ARCHITECTURE)
    gpu = GPUS[ARCHITECTURE].in_tf32() if dtype == "float32" else GPUS[ARCHITECTURE]
    t = total(works, gpu, ARCHITECTURE)
    items = {work.item for work in works if work.item is not None}
    anatomies |= {fingerprint([described(item)]): of_launch(item, ARCHITECTURE) for item in items}
    say(f"{name}, {mode}, {dtype}: {1e3 * t.floor_seconds:.2f} ms")
    return {
        "network": name, "mode": mode, "dtype": dtype, "launches": t.launches, "bytes_seconds": t.bytes_seconds,
        "operations_seconds": t.operations_seconds, "issue_seconds": t.issue_seconds,
        "roofline_seconds": t.roofline_seconds, "floor_seconds": t.floor_seconds,
    }  # fmt: skip


def known(found: dict[str, Any]) -> dict[str, Anatomy]:
    """What a file of this command says of single launches, by their fingerprints: it holds while those are the same."""
    from seqconv_triton.tools.instructions import Anatomy, Loop

    return {
        code: Anatomy(once, last, tuple(Loop(*loop) for loop in loops), operations)
        for code, (once, last, loops, operations) in found["anatomies"].items()
    }


def theirs() -> list[Row]:
    """The ResNets' rooflines."""
    found = []
    for name in peers.BLOCKS:
        for mode in ("eval", "train"):
            r = peers.roofline(name, mode, BATCH, GPUS[ARCHITECTURE], 2, IMAGE)
            found.append(
                {"network": name, "mode": mode, "dtype": "bfloat16"}
                | {k: v for k, v in r._asdict().items() if k != "launches"}
            )
    return found


def seconds(found: dict[str, Any], network: str, mode: str) -> float:
    """A network's floor in bfloat16, or its roofline where there is no machine code of it."""
    wanted = (network, mode, "bfloat16")
    row = next(r for r in found["rows"] if (r["network"], r["mode"], r["dtype"]) == wanted)
    return float(row.get("floor_seconds", row["roofline_seconds"]))


def markdown(found: dict[str, Any] | None) -> str:
    """The table of docs/performance.md."""
    if found is None:
        return "Not counted yet: `python -m bench floors` writes this table.\n"
    what = f"{found['architecture']}, {found['batch']} images of {found['image']}², in ms"
    lines = [f"| {what} | launches | bytes | FLOPs | issue | floor | ÷ roofline |", "| --- |" + " --- |" * 6]
    for row in found["rows"]:
        dtype = row["dtype"] if row["dtype"] != "float32" else "float32 as TF32"
        name = f"{row['network']}, {'evaluation' if row['mode'] == 'eval' else 'training step'}, {dtype}"
        times = [f"{1e3 * row[f'{key}_seconds']:.1f}" for key in ("bytes", "operations")]
        if "floor_seconds" in row:
            ratio = row["floor_seconds"] / row["roofline_seconds"]
            rest = f"{1e3 * row['issue_seconds']:.1f} | **{1e3 * row['floor_seconds']:.1f}** | {ratio:.2f}"
            lines.append(f"| {name} | {row['launches']:,} | {' | '.join(times)} | {rest} |")
        else:
            lines.append(f"| {name} | | {' | '.join(times)} | | {1e3 * row['roofline_seconds']:.1f} | |")
    source = found["provenance"]
    return (
        "\n".join(lines)
        + f"\n\nCounted with triton {source['triton']}, {source['date']}, revision {source['revision']}.\n"
    )

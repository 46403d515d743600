"""`python -m bench show`: what the library is for, measured as you watch: B42 beside the concatenating code."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import seqconv_triton as sct
from bench import subjects
from bench.cases import FIRST, Case
from bench.contenders import build
from bench.participants import Local
from bench.processes import python, spawn
from bench.report import mebibytes, milliseconds, say
from bench.results import Row, provenance, write_json
from bench.runner import run_case
from bench.workers import PRELOADED, ending

PLAIN = ("reference eager", "ours eager")
COLUMNS = ("", "concatenating", "seqconv_triton", "")
WIDTHS = (38, 15, 16, 30)
READY = "ready"
PATIENCE = 120  # seconds for a process to import everything


@dataclass(frozen=True)
class Line:
    """A comparison, in seconds or bytes; where theirs was `given_up`, it would have taken more than `theirs`."""

    name: str
    theirs: float
    ours: float
    unit: str
    note: str = ""
    given_up: bool = False

    def texts(self) -> tuple[str, str]:
        """Theirs and ours."""
        theirs, ours = (self.text(value) for value in (self.theirs, self.ours))
        return f"> {theirs}" if self.given_up else theirs, ours

    def text(self, value: float) -> str:
        if self.unit == "bytes":
            return mebibytes(value)
        return f"{value:.1f} s" if value >= 2 else f"{milliseconds(value)} ms"

    def __str__(self) -> str:
        return row_of(self.name, *self.texts(), self.note)


def row_of(*cells: str) -> str:
    others = "".join(f"{cell:>{width}}" for cell, width in zip(cells[1:], WIDTHS[1:], strict=True))
    return f"{cells[0]:<{WIDTHS[0]}}{others}".rstrip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sct.list_models(), default=FIRST, help=f"default: {FIRST}")
    parser.add_argument("--image", type=int, default=224, help="its height and width (default: 224)")
    parser.add_argument("--limit", type=float, default=20, help="seconds to wait for the other code's compilation")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder (default: out/demo)")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.child:
        compile_theirs(evaluation_of(arguments.model, arguments.image, device), device)
        return 0
    source = provenance(device)
    model = sct.create_model(arguments.model, device="meta")
    say(f'model = torch.compile(sct.create_model("{arguments.model}"))\n\nIts first stage, a row for every group:\n')
    say(f"{model.stages[0].plan}\n")
    where = source.get("gpu") or f"{source['processor']}, {source['threads']} threads"
    say(f"{arguments.model}, {arguments.image}×{arguments.image}, on {where}; medians of interleaved runs:\n")
    say(row_of(*COLUMNS))
    lines = []
    for line in measured(arguments.model, arguments.image, device, arguments.limit):
        say(str(line))
        lines.append(line)
    lines_as_data = [asdict(line) for line in lines]
    write_json(arguments.output / "showcase.json", {"provenance": source, "lines": lines_as_data})
    picture = draw(lines, arguments.model, where, arguments.output / "showcase.png")
    say(f"\nThe same as a picture and as data: {picture}, showcase.json\n")
    return 0


def measured(model: str, image: int, device: torch.device, limit: float) -> Iterator[Line]:
    """Every line as soon as it is known."""
    gpu, evaluation = device.type == "cuda", evaluation_of(model, image, device)
    rows = by_contender(run_case(evaluation, device, None, isolated=not gpu), "eval")
    theirs, eager, compiled = (rows[label] for label in evaluation.contenders)
    what = f"evaluation, {evaluation.batch} images"
    yield timed(what, theirs, eager)
    yield timed(f"{what}, ours compiled", theirs, compiled)
    yield of_bytes("evaluation, peak memory", theirs, eager, "peak_bytes")
    say(row_of("logits, relative distance to theirs", "", f"{compiled['error']:.1e}", ""))
    ours = compiled["compile_seconds"]
    waited, through = compilation(model, image, max(limit, ours))
    name = "torch.compile, caches empty" if compiled["caches"] == "cold" else "torch.compile"
    yield Line(name, waited, ours, "s", "" if through else "theirs was not waited for", not through)
    step = replace(evaluation, training=True, batch=evaluation.batch // 4, contenders=PLAIN, rounds=3)
    rows = by_contender(run_case(step, device, None, isolated=not gpu), "step")
    theirs, ours = (rows[label] for label in PLAIN)
    what = f"training step, {step.batch} images"
    yield timed(what, theirs, ours)
    yield of_bytes("training step, peak memory", theirs, ours, "peak_bytes")
    yield of_bytes("kept for backward, per image", theirs, ours, "kept_bytes", step.batch)


def by_contender(rows: list[Row], part: str) -> dict[str, Row]:
    """The rows of a part. Raises RuntimeError for a result that is wrong or failed."""
    for row in rows:
        if reason := row.get("wrong") or row.get("failed"):
            raise RuntimeError(f"{row['contender']}: {reason}")
    return {row["contender"]: row for row in rows if row["part"] == part}


def timed(name: str, theirs: Row, ours: Row) -> Line:
    return Line(name, theirs["median"], ours["median"], "s", f"{theirs['median'] / ours['median']:.2f} × as fast")


def of_bytes(name: str, theirs: Row, ours: Row, field: str, images: int = 1) -> Line:
    return Line(
        name, theirs[field] / images, ours[field] / images, "bytes", f"{ours[field] / theirs[field]:.0%} of theirs"
    )


def evaluation_of(model: str, image: int, device: torch.device) -> Case:
    batch, dtype = (64, "bfloat16") if device.type == "cuda" else (8, "float32")
    return Case(model, False, batch, (*PLAIN, "ours compiled"), 4, image, dtype, processes=1)


def compilation(model: str, image: int, limit: float) -> tuple[float, bool]:
    """Seconds of the concatenating code's compilation and first run, or the limit, in seconds, if they take longer."""
    child = spawn(python("bench", "show", "--child", "--model", model, "--image", str(image)))
    try:
        child.says(READY, time.monotonic() + PATIENCE)
        status = child.end_by(time.monotonic() + limit)
        last = (child.lines() or [ending(status or 0)])[-1]
    finally:
        child.close()
    if status:
        raise RuntimeError(f"reference compiled: {last}")
    return (limit, False) if status is None else (float(last), True)


def compile_theirs(case: Case, device: torch.device) -> None:
    """The child of `compilation`: like a worker of ours it has imported the compiler before it begins."""
    for name in PRELOADED:
        importlib.import_module(name)
    module, shape = subjects.make(case.subject, case.image)
    x = subjects.random_input(shape, case.batch, device)
    theirs = Local(build("reference compiled", case, module.to(device), x), case, device)
    say(READY)
    facts, _ = theirs.first()
    say(str(facts["compile_seconds"]))


def draw(lines: list[Line], model: str, where: str, path: Path) -> Path:
    """A panel for every comparison, a bar for each side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 + 0.72 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, line in zip(figure.subplots(len(lines), 1, squeeze=False).flat, lines, strict=True):
        values = [line.ours, line.theirs]
        bars = axes.barh(COLUMNS[2:0:-1], values, color=["#0072b2", "#d55e00"])
        if line.given_up:
            bars[1].set(hatch="///", edgecolor="white", linewidth=0)
        for place, (value, text) in enumerate(zip(values, reversed(line.texts()), strict=True)):
            axes.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", size=8)
        axes.set_xlim(0, 1.15 * max(values))
        axes.set_title(line.name, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.supxlabel(f"{model}; {where}", fontsize=7, color="0.4")
    figure.savefig(path, dpi=110)
    return path

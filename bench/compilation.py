"""`python -m bench compile`: what torch.compile costs from empty caches: B42's training step, and timm's ResNet-50's.

Each network in a process of its own, whose Inductor compiles in that process alone, so that every second has an owner.
Afterwards other batches come, which should not be compiled anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from typing import Any

import torch

import seqconv_triton as sct
from bench import peers
from bench.cases import FIRST
from bench.processes import python
from bench.report import say
from bench.results import FOLDER, provenance, write_json

NETWORKS = (FIRST, "resnet50")
BATCHES, IMAGE = (2, 3, 8, 17), 224
GOAL = 1 / 3  # of the time that ResNet-50 takes
FILE = FOLDER / "compile.json"
# Names of torch._dynamo.utils.compilation_time_metrics, of which none contains another.
TRACING, AOT, CPP = "bytecode_tracing", ("aot_trace_joint_graph", "aot_collect_metadata"), "compile_file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--child", choices=NETWORKS, help=argparse.SUPPRESS)


def run_from_arguments(arguments: argparse.Namespace) -> int:
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return 0
    contents: dict[str, Any] = {"provenance": provenance(torch.device("cpu")), "image": IMAGE, "batches": BATCHES}
    contents["rows"] = [in_own_process(name) for name in NETWORKS]
    write_json(FILE, contents)
    say(markdown(contents))
    return 0


def in_own_process(network: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = python("bench", "compile", "--child", network)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{network}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(network: str) -> dict[str, Any]:
    """Seconds to the end of the first compiled training step beyond an eager one's, whose they are, and graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import compilation_time_metrics as spent

    torch.set_num_threads(2)
    model = peers.create(network) if network in peers.PEERS else sct.create_model(network)
    inputs = [torch.randn(batch, 3, IMAGE, IMAGE) for batch in BATCHES]
    model(inputs[0]).sum().backward()
    start = time.perf_counter()
    model(inputs[0]).sum().backward()
    eager = time.perf_counter() - start
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    start = time.perf_counter()
    compiled(inputs[0]).sum().backward()
    seconds = time.perf_counter() - start - eager
    shares = {"tracing": sum(spent[TRACING]), "autograd": sum(sum(spent[name]) for name in AOT), "C++": sum(spent[CPP])}
    compilations = 1  # a training graph is several of the counter's
    for x in inputs[1:]:
        before = counter.frame_count
        compiled(x).sum().backward()
        compilations += counter.frame_count > before
    row = {"network": network, "seconds": seconds, "shares": shares, "compilations": compilations}
    return row | ({"version": peers.label()} if network in peers.PEERS else {})


def markdown(contents: dict[str, Any] | None) -> str:
    """A line for each network; what no share names is Inductor's own Python."""
    if contents is None:
        return "Not measured yet: `python -m bench compile` writes this part, where timm can be imported.\n"
    batches = ", ".join(map(str, contents["batches"]))
    lines = [
        f"| training step, fullgraph, dynamic, empty caches | seconds | tracing | autograd | Inductor | C++ compiler | "
        f"compilations for batches {batches} |",
        "| --- |" + " --- |" * 6,
    ]
    for row in contents["rows"]:
        parts = list(row["shares"].values())
        rest = row["seconds"] - sum(parts)
        cells = [f"{part:.1f}" for part in (*parts[:2], rest, parts[2])]
        name = f"{row['network']}, {row['version']}" if "version" in row else f"**{row['network']}**"
        lines.append(f"| {name} | {row['seconds']:.1f} | {' | '.join(cells)} | {row['compilations']} |")
    ours, theirs = (row["seconds"] for row in contents["rows"])
    once = contents["rows"][0]["compilations"] == 1
    verdict = "reached" if ours <= GOAL * theirs and once else "**missed**"
    source = contents["provenance"]
    return "\n".join(lines) + (
        f"\n\nOurs takes {ours / theirs:.2f} of ResNet-50's time (goal: a third, and one compilation for all batches; "
        f"{verdict}), forward and backward, one run each, Inductor compiling in one process "
        f"(TORCHINDUCTOR_COMPILE_THREADS=1), on an {source['processor']} with {source['vectors']}, torch "
        f"{source['torch']}, {source['date']}, revision {source['revision']}.\n"
    )

"""Seconds from a fresh process to the end of the first compiled training step: caches empty, then full."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time

import torch

from bench.cases import FIRST, Case
from bench.processes import python
from bench.results import Row


def first_step(model: str, batch: int, image: int) -> float:
    """Build, compile, step once; seconds, without the import of torch."""
    from bench import contenders, subjects
    from bench.timing import unmarked

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(model, True, batch, (), image=image, dtype="bfloat16" if device.type == "cuda" else "float32")
    base, shape = subjects.make(model, image)
    x = subjects.random_input(shape, batch, device)
    start = time.perf_counter()
    contenders.build("ours compiled", case, base, x).run(unmarked)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: str = FIRST, batch: int = 8, image: int = 224, timeout: float | None = None) -> list[Row]:
    """Two rows, cold and warm, each from a process of its own with a cache folder that both share."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        for state in ("cold", "warm"):
            row: Row = {
                "subject": model, "part": "startup", "batch": batch, "image": image, "contender": f"ours {state}",
                "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
            }  # fmt: skip
            command = python("bench", "startup", "--child", "--model", model, "--batch", str(batch))
            command += ["--image", str(image)]
            try:
                done = subprocess.run(
                    command, env=os.environ | caches, capture_output=True, text=True, timeout=timeout, check=False
                )
            except subprocess.TimeoutExpired:
                rows.append(row | {"failed": f"not through after {timeout:.0f} s"})
                continue
            if done.returncode:
                rows.append(row | {"failed": (done.stderr.strip().splitlines() or ["?"])[-1]})
                continue
            seconds = json.loads(done.stdout.splitlines()[-1])
            rows.append(row | {"seconds": [seconds], "median": seconds, "lower": seconds, "upper": seconds})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=FIRST)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)


def run_from_arguments(arguments: argparse.Namespace) -> int:
    if arguments.child:
        print(json.dumps(first_step(arguments.model, arguments.batch, arguments.image)))
        return 0
    rows = measure(arguments.model, arguments.batch, arguments.image)
    for row in rows:
        print(f"{row['contender']:<12}{row['median']:.1f} s" if "median" in row else f"failed: {row['failed']}")
    return int(any("failed" in row for row in rows))

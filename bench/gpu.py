"""First figures on a GPU: evaluation and training step of the ImageNet networks against the concatenating reference.

`make gpu` runs it: the GPU tests first, beside the compilation of all kernels, then the table. The compiled reference
comes last and only while there is time: compiling it takes minutes. Figures are medians of CUDA-event timings, on
random images, after the outputs were compared.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import seqconv_triton as sct
from bench.cpu import random_model

MODELS = ("seqresnet_b42", "seqresnet_b22", "seqresnext_24")
# Milliseconds that the four stages' convs of B42 need at batch 256: the sum over launches of max(bytes, arithmetic).
B42_ROOFLINE_MS = 6.5


def measure(run: Callable[[], object], repeats: int = 10) -> float:
    """Median milliseconds of a call."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def evaluation(model: nn.Module, x: Tensor, graph: bool) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return model(x)

    if not graph:
        return run
    run()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def training(model: nn.Module, x: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, foreach=True)
    target = torch.arange(len(x), device=x.device) % 1000

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return run


def table(batch: int, deadline: float) -> list[dict[str, Any]]:
    """One row a model, mode and contender; rows after the deadline are left out and said to be."""
    rows: list[dict[str, Any]] = []

    def add(name: str, mode: str, contender: str, milliseconds: float) -> None:
        rows.append({"model": name, "mode": mode, "contender": contender, "batch": batch, "ms": milliseconds})
        print(f"{name:<15}{mode:<15}{contender:<20}{milliseconds:>9.2f} ms{batch / milliseconds * 1e3:>9.0f} images/s")

    x = torch.randn(batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    for compiled in (False, True):
        for name in MODELS if not compiled else MODELS[:1]:
            model = random_model(name).cuda()
            check(model, x[:8])
            for mode in ("eval", "training step"):
                for backend in ("triton", "reference"):
                    contender = backend + (" compiled" if compiled else "")
                    if time.monotonic() > deadline:
                        print(f"{name:<15}{mode:<15}{contender:<20} left out: no time")
                        continue
                    torch._dynamo.reset()
                    model.train(mode != "eval")
                    called = torch.compile(model) if compiled else model
                    with sct.use_backend(backend):
                        if mode == "eval":
                            add(name, mode, contender, measure(evaluation(called, x, graph=False)))
                            if backend == "triton" and not compiled:
                                add(name, mode, "triton graph", measure(evaluation(called, x, graph=True)))
                        else:
                            torch.cuda.reset_peak_memory_stats()
                            add(name, mode, contender, measure(training(called, x), 5))
                            rows[-1]["peak_bytes"] = torch.cuda.max_memory_allocated()
    return rows


def check(model: nn.Module, x: Tensor) -> None:
    """A wrong result prints no time."""
    outputs = []
    for backend in ("reference", "triton"):
        with sct.use_backend(backend):
            outputs.append(evaluation(model.eval(), x, graph=False)())
    expected, got = (output.double() for output in outputs)
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < 0.05:
        raise RuntimeError(f"the triton backend is off by {error:.1e}: nothing was timed")


def warm(name: str) -> None:
    """Compile what the table needs of one model into Triton's cache: batch sizes share kernels."""
    x = torch.randn(16, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    model = random_model(name).cuda()
    training(model.train(), x)()
    evaluation(model.eval(), x, graph=False)()


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], deadline: float) -> tuple[bool, list[str]]:
    """Whether it succeeded in time, and what it printed."""
    try:
        text, _ = process.communicate(timeout=max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        text = process.communicate()[0] + "\nstopped: no time left"
    return process.returncode == 0, text.splitlines()


def prepare(seconds: float) -> dict[str, Any]:
    """Run the GPU tests and compile the models' kernels, side by side: compiling needs cores, not the GPU."""
    began = time.monotonic()
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    tests = start("pytest", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider", *workers)
    for name, process in [(name, start("bench", "--gpu-warm", name)) for name in MODELS]:
        good, lines = finish(process, began + seconds)
        if not good:
            print(f"{name} did not compile and run:", *lines[-15:], sep="\n")
    passed, lines = finish(tests, began + seconds)
    print(*lines[-3 if passed else -60 :], sep="\n")
    taken = time.monotonic() - began
    print(f"tests and compilation took {taken:.0f} s")
    return {"passed": passed, "summary": lines[-1] if lines else "", "seconds": taken}


def main() -> dict[str, Any]:
    """Tests, then the table, within nine minutes; return what belongs into the JSON."""
    import triton

    end = time.monotonic() + 520
    tests = prepare(270)

    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, torch {torch.__version__}, triton {triton.__version__}; bfloat16 autocast, 224², batch 256")
    rows = table(256, end - 60)
    print(f"B42's four stages at batch 256 could take {B42_ROOFLINE_MS} ms (H200, sum of launch rooflines)")
    return {
        "gpu": device.name,
        "memory": device.total_memory,
        "triton": triton.__version__,
        "tests": tests,
        "rows": rows,
    }

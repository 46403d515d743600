"""int8 on a CPU as PyTorch's documentation shows it: fuse, export, quantise (PT2E, x86 Inductor), compile.

SeqResNet-B22 beside ResNet-50, both with random weights and BN statistics of the images they see. Needs torchao.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqconv_triton as sct
from bench import peers, subjects

HEAD = "| network | convs in int8 | float32, compiled | int8, compiled | | distance of the logits | same class |"


def images(count: int, size: int) -> Tensor:
    """Smooth random colours: on white noise all images have the same logits."""
    small = torch.randn(count, 3, max(size // 32, 2), max(size // 32, 2))
    return F.interpolate(small, size=size, mode="bicubic").contiguous(memory_format=torch.channels_last)


def network(name: str, size: int) -> nn.Module:
    model = subjects.make(name, size)[0] if name in sct.list_models() else peers.create(name)
    model.train()
    with torch.no_grad():
        for _ in range(8):
            model(images(16, size))
    return model.eval()


def quantised(model: nn.Module, x: Tensor) -> nn.Module:
    """Calibrated on four batches like x; scales of activations are one a tensor, of weights one a channel."""
    pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    for _ in range(4):
        prepared(images(x.shape[0], x.shape[2]))
    converted: nn.Module = pt2e.convert_pt2e(prepared)
    return converted


def count(model: Any) -> tuple[int, int]:
    """Convs whose input and weight are int8, and all."""
    convs = [node for node in model.graph.nodes if str(node.target) == "aten.conv2d.default"]
    return sum(all("dequantize" in str(a.target) for a in conv.args[:2]) for conv in convs), len(convs)


def milliseconds(runs: list[Callable[[Tensor], Tensor]], x: Tensor, rounds: int) -> list[float]:
    """Medians of interleaved rounds."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - start)
    return [1e3 * median(times) for times in seconds]


def row(name: str, batch: int, size: int, rounds: int) -> str:
    torch.manual_seed(0)
    model, x = network(name, size), images(batch, size)
    folded = sct.fuse(model, plain=True) if name in sct.list_models() else model
    with torch.no_grad():
        converted = quantised(copy.deepcopy(folded), x)
        ints, convs = count(converted)
        plain, small = torch.compile(folded), torch.compile(converted)
        plain(x), small(x)
        before, after = milliseconds([plain, small], x, rounds)
        parts = [images(batch, size) for _ in range(8)]
        expected, got = (torch.cat([run(part) for part in parts]) for run in (plain, small))
    distance = ((got - expected).norm() / expected.norm()).item()
    same = (got.argmax(1) == expected.argmax(1)).float().mean().item()
    return (
        f"| {name} | {ints} of {convs} | {before:.0f} ms | {after:.0f} ms | {before / after:.2f} × | "
        f"{distance:.1%} | {same:.0%} |"
    )


def versions() -> str:
    return f"torch {torch.__version__}, torchao {importlib.metadata.version('torchao')}, {peers.label()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", default=["seqresnet_b22", "resnet50"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)


def run_from_arguments(arguments: argparse.Namespace) -> int:
    # oneDNN's int8 convs need weights that are constants.
    setattr(importlib.import_module("torch._inductor.config"), "freezing", True)  # noqa: B010 - the module has no such name for mypy
    print(HEAD)
    print("|" + " --- |" * 7)
    for name in arguments.networks:
        print(row(name, arguments.batch, arguments.image, arguments.rounds), flush=True)
    print(f"\n{arguments.batch} images of {arguments.image}², {torch.get_num_threads()} threads, {versions()}")
    return 0

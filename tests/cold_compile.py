"""`python tests/cold_compile.py`: what compiling SeqResNet-B42's training step costs from empty caches, as JSON."""

from __future__ import annotations

import json
import os
import time

import torch
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_inductor_cache

import seqconv_triton as sct


def processor_seconds() -> float:
    """Of this process and of the compilers that it started and waited for."""
    return sum(os.times()[:4])


def main() -> dict[str, float]:
    nodes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nodes.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return compile_fx(graph, inputs)

    config.compile_threads = 1  # else workers compile, whose processor time would be missed
    model, x = sct.SeqResNetB42(), torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    with fresh_inductor_cache():
        wall, processor = time.perf_counter(), processor_seconds()
        torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    return {"nodes": nodes[-1], "wall": time.perf_counter() - wall, "processor": processor_seconds() - processor}


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(main()))

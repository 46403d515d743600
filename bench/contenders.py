"""Contenders: one way to run a subject, as a function that marks the end of forward, backward and step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import seqconv_triton as sct
from bench import peers
from bench.cases import Case
from bench.subjects import channels_last
from bench.timing import Mark, Run, unmarked

MODES = {"compiled": "default", "max-autotune": "max-autotune"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a run computed, by name; a list's tensors, flat and one behind the other, are one result.
Found = dict[str, Tensor | list[Tensor]]


@dataclass
class Contender:
    """`run(mark)` runs once; `state` are tensors it keeps alive, `results` what its last run gave.

    `gather` adds what only the check wants, and what a run should not be charged for.
    """

    label: str
    run: Run
    state: Callable[[], list[Tensor]] = list
    results: dict[str, Tensor] = field(default_factory=dict)
    module: nn.Module | None = None
    gather: Callable[[], Found] = dict

    def found(self) -> Found:
        """Everything that the last run computed; nothing is copied."""
        return {**self.results, **self.gather()}


Build = Callable[[str, Case, nn.Module, Tensor], Contender]


def compiled(label: str) -> bool:
    return label.split()[-1] in MODES


def backend(who: str, device: torch.device) -> str | None:
    """The backend behind a name; peers have none."""
    return {"reference": "reference", "ours": "triton" if device.type == "cuda" else "aten"}.get(who)


def build(label: str, case: Case, base: nn.Module, x: Tensor) -> Contender:
    """A contender with its own copy of `base` (a peer: with its own weights), not run yet."""
    who, how = label.split()
    module = peer_like(who, x) if who in peers.PEERS else copy.deepcopy(base)
    module = channels_last(module.to(x.device)).train(case.training)
    if how == "fused":
        module = sct.fuse(module, pack=True)
    dtype = DTYPES[case.dtype]
    if not case.training:
        module, x = module.to(dtype), x.to(dtype)
    elif isinstance(module, sct.SeqConv2d | sct.Stage):
        x = x.clone().requires_grad_()
    called: Callable[[Tensor], Tensor] = module
    if how in MODES:
        called = torch.compile(module, fullgraph=True, dynamic=False, mode=MODES[how])
    elif how == "graph" and who in peers.PEERS:
        called = torch.compile(module, fullgraph=True, dynamic=False)
    contender = training(label, module, called, x, dtype) if case.training else evaluation(label, module, called, x)
    if who not in peers.PEERS:
        contender.run = within(backend(who, x.device), contender.run)
    return captured(contender) if how == "graph" else contender


def peer_like(who: str, x: Tensor) -> nn.Module:
    if x.shape[1] != 3:
        raise ValueError(f"{who} takes images, not {x.shape[1]} channels")
    torch.manual_seed(0)
    return peers.create(who)


def within(name: str | None, run: Run) -> Run:
    def chosen(mark: Mark) -> object:
        with sct.use_backend(name):
            return run(mark)

    return chosen


def evaluation(label: str, module: nn.Module, called: Callable[[Tensor], Tensor], x: Tensor) -> Contender:
    results: dict[str, Tensor] = {}

    def run(mark: Mark) -> None:
        with torch.no_grad():
            results["output"] = called(x)
        mark("eval")

    return Contender(label, run, lambda: [*tensors(module), x], results, module)


def training(
    label: str, module: nn.Module, called: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype
) -> Contender:
    """A network: cross-entropy and SGD, nothing left out. A stage or layer: a random gradient comes from above."""
    whole = not x.requires_grad
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    target = torch.arange(len(x), device=x.device) % 10
    above: list[Tensor] = []
    results: dict[str, Tensor] = {}

    def run(mark: Mark) -> None:
        optimizer.zero_grad(set_to_none=True)
        x.grad = None
        with mixed(x.device, dtype):
            output = called(x)
            loss = nn.functional.cross_entropy(output, target) if whole else output
        mark("forward")
        if whole:
            loss.backward()
        else:
            if not above:
                generator = torch.Generator().manual_seed(1)
                above.append(torch.randn(output.shape, generator=generator).to(output))
            output.backward(above[0])
        mark("backward")
        if whole:
            optimizer.step()
        mark("step")
        results["output"] = output.detach()

    def state() -> list[Tensor]:
        grown = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        return [*tensors(module), x, *grown, *above]

    def gather() -> Found:
        found: Found = {"gradients": [p.grad for p in module.parameters() if p.grad is not None]}
        return found if x.grad is None else found | {"input gradient": x.grad}

    return Contender(label, run, state, results, module, gather)


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def mixed(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast with float32 master weights where the dtype is not float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def captured(contender: Contender) -> Contender:
    """The same run as one CUDA graph, replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            contender.run(unmarked)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender.run(unmarked)

    def replay(mark: Mark) -> None:
        graph.replay()
        mark("eval")

    return Contender(contender.label, replay, contender.state, contender.results, contender.module)

"""B42 on a CPU: evaluation and a training step, ours against the concatenating reference, eager and compiled."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import seqconv_triton as sct
from bench.timing import Timing, interleave, pairwise_ratio


@dataclass(frozen=True)
class Case:
    """One row: what runs, on how many images, for how many rounds."""

    name: str
    training: bool
    batch: int
    rounds: int
    compiled: bool = False  # also under torch.compile, when that is asked for


CASES = (
    Case("eval", False, 8, 9, compiled=True),
    Case("eval", False, 1, 9),
    Case("training step", True, 4, 7),
)


def random_model(name: str) -> nn.Module:
    """A model whose zero-initialised layers are made random: zeros would make the check before timing blind."""
    torch.manual_seed(0)
    model = sct.create_model(name)
    with torch.no_grad():
        for stage in model.stages:
            stage.transform_weight.normal_(0, (2 / stage.transform_weight[0].numel()) ** 0.5)
            for group, weight in zip(
                stage.plan.groups, stage.transform_weight.split(stage.plan.group_width), strict=True
            ):
                if group.residual_start is not None:
                    weight.mul_(0.1)
    return model.to(memory_format=torch.channels_last)


def step_of(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, training: bool) -> Callable[[], Tensor]:
    """One evaluation pass, or one whole SGD step."""
    if not training:

        def evaluate() -> Tensor:
            with torch.no_grad():
                return run(x)

        return evaluate
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    target = torch.arange(len(x)) % 1000

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


@contextmanager
def cold_compilation() -> Iterator[None]:
    """No compilation cache, on disk or in memory, helps inside."""
    import torch._inductor.config

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that caches are off
        yield


def contender(backend: str, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sct.use_backend(backend):
            return step()

    return run


def run_case(case: Case, model_name: str, compiled: bool) -> dict[str, object]:
    """Check that all contenders agree, then time them; compile times are those of the first, cold call."""
    x = torch.randn(case.batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    base = random_model(model_name).train(case.training)
    contenders: dict[str, Callable[[], Tensor]] = {}
    compile_seconds: dict[str, float] = {}
    first: dict[str, Tensor] = {}
    for backend, label in (("reference", "reference"), ("aten", "ours")):
        model = copy.deepcopy(base)
        contenders[label] = contender(backend, step_of(model, model, x, case.training))
        first[label] = contenders[label]()
        if not compiled:
            continue
        model = copy.deepcopy(base)
        step = contender(backend, step_of(model, torch.compile(model, fullgraph=True), x, case.training))
        with cold_compilation():
            start = time.perf_counter()
            first[f"{label} compiled"] = step()
            compile_seconds[label] = time.perf_counter() - start
        contenders[f"{label} compiled"] = step
    expected = first["reference"]
    for label, value in first.items():
        error = ((value - expected).norm() / expected.norm()).item()
        if not error < 1e-3:
            raise RuntimeError(f"{label} is wrong by {error:.1e} in {case.name}: nothing was timed")
    timings = interleave(contenders, case.rounds)
    return {
        "case": case.name,
        "batch": case.batch,
        "seconds": {label: timing.seconds for label, timing in timings.items()},
        "compile_seconds": compile_seconds,
        "rows": [row(case, label, timing, timings) for label, timing in timings.items()],
    }


def row(case: Case, label: str, timing: Timing, timings: dict[str, Timing]) -> str:
    lower, upper = timing.quartiles
    ratio = pairwise_ratio(timings["reference"], timing)
    return (
        f"{case.name:<14} {case.batch:>5}  {label:<19} {timing.median * 1e3:>8.0f} ms "
        f"[{lower * 1e3:.0f}, {upper * 1e3:.0f}]  {ratio:>5.2f} ×"
    )

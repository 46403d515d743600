"""Measuring configurations: what a call writes, which results are right, which configuration is fastest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is for Linux only")

import seqconv_triton as sct
from seqconv_triton.kernels import launch
from seqconv_triton.kernels.candidates import candidates
from seqconv_triton.kernels.configs import config_for
from seqconv_triton.kernels.heuristic import TWO_STAGES, Key, LaunchConfig, heuristic
from seqconv_triton.plan import Plan, Tail
from seqconv_triton.tools import measure, tune
from seqconv_triton.tools.measure import Call, Outcome, Work

pytestmark = pytest.mark.usefixtures("triton_that_fences")
ARCH = "sm_90"
KEY = Key("convolution", 512, 64, 4, 1)
PROPOSED = candidates(KEY, ARCH)
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="the interpreter is off where there is a GPU")


def works_of(plan: Plan, images: tuple[int, ...]) -> list[Work]:
    return tune.collect(nn.Sequential(sct.Stage(plan, device="meta")), images, torch.float32, ARCH)


@interpreted
def test_every_candidate_of_a_stage_is_right_and_the_fastest_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, where warps and stages mean nothing: each tile once, four stages being the fastest."""
    real = measure.candidates
    tiles: dict[Key, list[LaunchConfig]] = {}

    def distinct(key: Key, arch: str) -> list[LaunchConfig]:
        first, *others = {config[:3]: config for config in reversed(real(key, arch))}.values()
        tiles[key] = [heuristic(key, arch), *(c for c in (first, *others) if c[:3] != heuristic(key, arch)[:3])]
        tiles[key][-1] = tiles[key][-1]._replace(num_stages=4)
        return tiles[key]

    monkeypatch.setattr(measure, "candidates", distinct)
    plan = Plan.stage(8, 8, 1, subgroups=2, extension=8, tail=Tail(16, 3, 2, 4, repeats=2))
    works = works_of(plan, (2, plan.in_channels, 5, 4))
    outcomes: list[Outcome] = []
    measure.measure_stage(works, torch.float32, CPU, timer_of_stages, math.inf, outcomes.append)
    assert {outcome.key for outcome in outcomes} == {work.key for work in works}
    assert {outcome.key.kernel for outcome in outcomes} == set(TWO_STAGES)
    for outcome in outcomes:
        assert (outcome.wrong, outcome.rejected) == ("", {}), outcome.key
        if len(tiles[outcome.key]) > 1:
            assert outcome.config == tiles[outcome.key][-1] != outcome.heuristic
            assert (outcome.milliseconds, outcome.heuristic_milliseconds) == (0.5, 1)


def timer_of_stages(run: Callable[[], object]) -> tuple[float, float, float]:
    """Half the time with four stages of loads in flight; it runs nothing."""
    heard: list[int] = []
    with launch.listen(lambda kernel, grid, arguments: heard.append(arguments["num_stages"])):
        run()
    return (0.5,) * 3 if heard[0] == 4 else (1.0,) * 3


@interpreted
def test_a_stage_that_is_wrong_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    works = works_of(Plan.stage(8, 8, 1), (2, 8, 3, 3))
    right = measure._training_step

    def step(stage: Any, x: Tensor, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        results = right(stage, x, backend, dtype)
        if backend == "triton":
            results["reduce_weight"] = 1.01 * results["reduce_weight"]
        return results

    monkeypatch.setattr(measure, "_training_step", step)
    outcomes: list[Outcome] = []
    measure.measure_stage(works, torch.float32, CPU, timer_of_stages, math.inf, outcomes.append)
    assert len(outcomes) == len(works)
    assert all("reduce_weight of its stage is off by 1e-02" in o.wrong and o.config == o.heuristic for o in outcomes)


@interpreted
def test_rounding_alone_is_not_wrong() -> None:
    plan = Plan.stage(32, 16, 1, tail=Tail(32, 3, 2, 4))
    stage = measure._prepared(sct.Stage(plan), CPU)
    assert measure.check(stage, torch.randn(2, plan.in_channels, 5, 4), torch.float16) == ""


@interpreted
def test_a_stage_that_raises_is_wrong() -> None:
    def fails(*_: object, **__: object) -> None:
        raise NotImplementedError("no such instruction")

    stage = measure._prepared(sct.Stage(Plan.stage(8, 8, 1)), CPU)
    with launch.listen(fails):
        assert measure.check(stage, torch.randn(2, 8, 3, 3), torch.float32) == "NotImplementedError"


Fault = Callable[[Tensor, Tensor, Tensor], object]


class Launcher:
    """A launcher in plain PyTorch: `out`, a slice of the memory that `x` is in, becomes 2·x, and x's sum is returned.

    `faults` says what else a configuration does; `used` lists the configurations.
    """

    def __init__(self, faults: dict[LaunchConfig, Fault] | None = None) -> None:
        self.faults, self.used = faults or {}, list[LaunchConfig]()
        self.memory = torch.randn(2000, 9)
        scratch = launch.Scratch(torch.zeros(8), torch.zeros(8), torch.zeros(8, dtype=torch.int32))
        self.call = Call(self, {"inputs": (self.memory, [self.memory[:, :4]]), "y": self.memory[:, 4:8], "s": scratch})

    def __call__(self, inputs: Any, y: Tensor, s: launch.Scratch) -> Tensor:
        config = config_for(KEY.kernel, KEY.reduction, KEY.block_n, KEY.element_size, ARCH, KEY.taps)
        self.used.append(config)
        x = inputs[1][0]
        s.first.fill_(config.block_p + config.num_stages)
        y.copy_(2 * x)
        total = x.sum(1)
        self.faults.get(config, measure.ignore)(x, y, total)
        return total

    def timer(self, times: dict[LaunchConfig, float]) -> measure.Timer:
        def timer(run: Callable[[], object]) -> list[float]:
            run()
            middle = times.get(self.used[-1], 1.0)
            return [0.999 * middle, middle, 1.001 * middle]

        return timer


def raises(x: Tensor, y: Tensor, total: Tensor) -> None:
    raise RuntimeError("an illegal memory access was encountered")


FAULTS: dict[str, Fault] = {
    "one element in a hundred": lambda x, y, total: y[::25, 2].neg_(),
    "one row, too little for the mean": lambda x, y, total: y[7].add_(0.06),
    "a little, everywhere": lambda x, y, total: y.mul_(1.01),
    "what is returned": lambda x, y, total: total.mul_(1.01),
    "an exception": raises,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_candidate_that_is_wrong_is_turned_down(fault: str) -> None:
    """Though its time would be the best; the other candidates are tried all the same."""
    bad, good = PROPOSED[1:3]
    launcher = Launcher({bad: FAULTS[fault]})
    outcome = measure.measure(launcher.call, KEY, PROPOSED, launcher.timer({bad: 0.1, good: 0.5}))
    assert (outcome.config, outcome.heuristic, outcome.wrong) == (good, PROPOSED[0], "")
    assert (outcome.milliseconds, outcome.heuristic_milliseconds) == (0.5, 1)
    assert list(outcome.rejected) == [bad]
    assert outcome.rejected[bad].startswith("RuntimeError" if fault == "an exception" else "wrong")
    assert set(launcher.used) == set(PROPOSED)


def test_what_a_candidate_leaves_unwritten_is_found() -> None:
    """Though the memory held the right numbers a moment ago."""
    bad = PROPOSED[1]

    class Lazy(Launcher):
        def __call__(self, inputs: Any, y: Tensor, s: launch.Scratch) -> Tensor:
            before = y.clone()
            total = super().__call__(inputs, y, s)
            if self.used[-1] == bad:
                y[-20:] = before[-20:]
            return total

    launcher = Lazy()
    launcher.call.run()
    outcome = measure.measure(launcher.call, KEY, [PROPOSED[0], bad], launcher.timer({bad: 0.1}))
    assert outcome.config == PROPOSED[0] and "wrong" in outcome.rejected[bad]


def test_memory_is_afterwards_what_it_was() -> None:
    """Also for a launcher that reads what it writes."""
    launcher = Launcher(dict.fromkeys(PROPOSED, lambda x, y, total: x.add_(1)))
    before = launcher.memory.clone()
    outcome = measure.measure(launcher.call, KEY, PROPOSED, launcher.timer({}))
    assert (outcome.wrong, outcome.rejected, outcome.config) == ("", {}, PROPOSED[0])
    assert torch.equal(launcher.memory, before)


def test_a_heuristic_that_is_wrong_leaves_the_key_alone() -> None:
    for fault, reason in ((lambda x, y, total: y[3].fill_(math.inf), "not finite"), (raises, "RuntimeError")):
        launcher = Launcher({PROPOSED[0]: fault})
        before = launcher.memory.clone()
        outcome = measure.measure(launcher.call, KEY, PROPOSED, launcher.timer({PROPOSED[1]: 0.1}))
        assert outcome.config == PROPOSED[0] and reason in outcome.wrong
        assert torch.equal(launcher.memory, before)
    outcome = measure.measure(Call(lambda: None, {}), KEY, PROPOSED, launcher.timer({}))
    assert outcome.wrong == "nothing is computed"


def test_a_gain_must_be_seen_twice_and_exceed_the_noise() -> None:
    assert measure.faster([0.9, 0.91, 0.92], [1.0, 1.01, 1.02])
    assert not measure.faster([0.98, 0.981, 0.982], [1.0, 1.001, 1.002])
    assert not measure.faster([0.5, 0.9, 1.4], [0.8, 1.0, 1.1])
    launcher, once = Launcher(), {PROPOSED[2]: 0.5}
    timer = launcher.timer(once)

    def luck(run: Callable[[], object]) -> Any:
        quartiles = timer(run)
        if launcher.used[-1] == PROPOSED[2]:
            once.clear()
        return quartiles

    assert measure.measure(launcher.call, KEY, PROPOSED, luck).config == PROPOSED[0]

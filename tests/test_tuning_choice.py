"""What the tuner measures and chooses: its keys, its candidates' results in the interpreter, the fastest of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from helpers import error, everything, randomise
from torch import nn

pytest.importorskip("triton", reason="Triton is for Linux only")

from tuning import ARCH, Clock, interpreted, keys_of

import seqconv_triton as sct
from seqconv_triton.kernels import configs, launch
from seqconv_triton.kernels.configs import LaunchConfig, heuristic
from seqconv_triton.kernels.tuning_candidates import candidates, fits
from seqconv_triton.plan import Plan, Tail
from seqconv_triton.tools import tuning_calls, tuning_measure
from seqconv_triton.tools.ahead import stage_inputs, stage_passes
from seqconv_triton.tools.tuning_calls import Call, collect, fill, on_device, recorded
from seqconv_triton.tools.tuning_measure import faster, measure

IMAGENET = ("seqresnet_b42", "seqresnet_b22", "seqresnext_24")

PLANS = {
    "bottleneck": Plan.stage(32, 16, 1, tail=Tail(32, 3, 2, 4)),
    "subgroups-quirk": Plan.stage(8, 8, 1, subgroups=2, extension=8, tail=Tail(16, 3, 2, 4, repeats=2)),
    "basic": Plan.stage(8, 4, 1, entry_channels=5, bottleneck=False, tail=Tail(8, 1)),
}


def calls_of(name: str, size: tuple[int, int, int] = (2, 5, 4), dtype: torch.dtype = torch.float32) -> list[Call]:
    """One call for each key of a stage, on the CPU, its inputs random."""
    plan = PLANS[name]
    stage = sct.Stage(plan, device="meta")
    works = collect(nn.Sequential(stage), (size[0], plan.in_channels, *size[1:]), dtype, ARCH)
    calls = on_device(works, dtype, torch.device("cpu"))
    for call in calls:
        fill(call)
    return calls


def call_of(family: str, name: str = "bottleneck", taps: int = 1) -> Call:
    return next(call for call in calls_of(name) if (call.key.kernel, call.key.taps) == (family, taps))


@pytest.mark.parametrize("name", IMAGENET)
def test_keys_depend_on_neither_batch_nor_image_size(name: str) -> None:
    first = keys_of(name, (64, 3, 224, 224))
    assert first == keys_of(name, (1, 3, 224, 224)) == keys_of(name, (3, 3, 97, 130))
    assert {key._replace(element_size=4) for key in first} == keys_of(name, (2, 3, 64, 64), torch.float32)
    assert 10 < len(first) < 60


def test_evaluation_has_no_keys_of_its_own() -> None:
    model = sct.create_model("seqresnext_24", device="meta")
    with configs.assume(ARCH), launch.listen(lambda *_: None), torch.no_grad():
        for stage, size in stage_inputs(model, (4, 3, 224, 224)):
            x = torch.empty(size, device="meta", dtype=torch.bfloat16)
            with configs.hear_keys() as evaluation:
                for run_pass in stage_passes(stage, x, training=False):
                    run_pass()
            assert evaluation and set(evaluation) <= {call.key for call in recorded(stage, x)}


def test_collected_launches_are_those_of_a_step() -> None:
    """B42, counted another way: two launches a group and pass, the tails, the weight gradients of a stage."""
    works = collect(sct.create_model("seqresnet_b42", device="meta"), (8, 3, 224, 224), torch.bfloat16, ARCH)
    count = dict.fromkeys(configs.TWO_STAGES, 0)
    for work in works:
        count[work.key.kernel] += work.launches
        assert work.call.amount * work.launches >= work.amount, "the call that does most"
    stages = [stage for stage, _ in stage_inputs(sct.create_model("seqresnet_b42", device="meta"), (1, 3, 64, 64))]
    groups = sum(len(stage.plan.groups) * (2 if stage.plan.bottleneck else 1) for stage in stages)
    tails = sum(stage.plan.tail is not None for stage in stages)
    assert count["convolution"] == groups + tails
    assert [work.amount for work in works] == sorted((work.amount for work in works), reverse=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["16-bit", "32-bit"])
def test_candidates_are_few_distinct_and_fit(dtype: torch.dtype, arch: str) -> None:
    for name in (*IMAGENET, "cifar_seqresnet_r4_k8"):
        for key in keys_of(name, (2, 3, 64, 64), dtype):
            proposed = candidates(key, arch)
            assert key.kernel not in configs.WITH_SUMS or heuristic(key, arch).block_p >= configs.smallest_tile(arch)
            assert proposed[0] == heuristic(key, arch)
            assert 2 <= len(proposed) == len(set(proposed)) <= 8
            for config in proposed:
                assert config.block_n == key.block_n
                assert configs.is_tile(config.block_p) and configs.is_tile(config.block_k)
                assert config.num_warps in (4, 8) and 2 <= config.num_stages <= 4
                assert config == proposed[0] or fits(config, key, arch)


@interpreted
@pytest.mark.parametrize("name", PLANS)
def test_every_candidate_of_every_key_is_right(name: str) -> None:
    """Against plain PyTorch, the configuration in use included; the sums' scratch follows the tile."""
    families = set()
    for call in calls_of(name):
        families.add((call.key.kernel, call.key.taps))
        exact = tuning_calls.plain(call)
        # Interpreted, warps and stages mean nothing: each tile once.
        tiles = {config[:3]: config for config in candidates(call.key, ARCH)}
        for config in tiles.values():
            with tuning_calls.with_config(call, config):
                got = tuning_calls.compute(call)
            assert max(map(error, got, exact)) < 1e-5, (call.key, config)
    assert {family for family, _ in families} == set(configs.TWO_STAGES)


@interpreted
def test_rounding_alone_is_no_difference() -> None:
    """In float16 every default is within the tolerance of plain float32, and no result overflows."""
    for call in calls_of("bottleneck", dtype=torch.float16):
        exact = tuning_calls.plain(call)
        got = tuning_calls.compute(call)
        assert tuning_measure.difference(got, exact, call) == "", call.key
        assert tuning_measure.difference([1.02 * result for result in got], exact, call), call.key


@interpreted
def test_sums_have_room_for_the_smallest_tile_of_a_table() -> None:
    """A whole stage with 16 pixels a tile from a table, forward and backward: four times the heuristic's tiles."""
    plan = Plan.stage(8, 8, 1, tail=Tail(8, 1))
    stage = randomise(sct.Stage(plan))
    x = torch.randn(2, 8, 7, 5)
    works = collect(nn.Sequential(sct.Stage(plan, device="meta")), tuple(x.shape), torch.float32, ARCH)
    table = {work.key: LaunchConfig(16, work.key.block_n, 16, 4, 2) for work in works}
    with sct.use_backend("reference"):
        exact = everything(stage.double(), x.double(), lambda module, t: [module(t)])
    with configs.use_tables(table), sct.use_backend("triton"), configs.hear_keys() as keys:
        assert len(launch.Scratch.allocate(x, 70, 8).first) == 5 + 1
        got = everything(stage.float(), x, lambda module, t: [module(t)])
    assert set(keys) == set(table)
    assert all(error(got[name], value) < 1e-5 for name, value in exact.items())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice alone: every configuration's result counts as right, and nothing is computed."""
    monkeypatch.setattr(tuning_measure, "plain", lambda call: [])
    monkeypatch.setattr(tuning_measure, "compute", lambda call: [])


@interpreted
@pytest.mark.parametrize("family", configs.TWO_STAGES)
def test_the_fastest_candidate_is_chosen(family: str) -> None:
    call = call_of(family)
    best = candidates(call.key, ARCH)[4]
    clock = Clock(lambda config: 0.5 if config == best else 1.0)
    outcome = measure(call, ARCH, clock)
    assert (outcome.before, outcome.after, outcome.wrong) == (heuristic(call.key, ARCH), best, "")
    assert outcome.milliseconds[outcome.before] / outcome.milliseconds[best] == pytest.approx(2, rel=0.02)
    assert set(clock.heard) == set(candidates(call.key, ARCH)), "every candidate was really configured"


@interpreted
def test_a_gain_within_the_noise_changes_nothing(quick: None) -> None:
    call = call_of("convolution")
    best = candidates(call.key, ARCH)[2]
    for gain, noise in ((0.98, 0.001), (0.9, 0.4)):  # less than 3 %; more, but the quartiles overlap
        outcome = measure(call, ARCH, Clock(lambda c, gain=gain: gain if c == best else 1.0, noise))  # type: ignore[misc]
        assert outcome.after == outcome.before == heuristic(call.key, ARCH)
    assert measure(call, ARCH, Clock(lambda c: 0.9 if c == best else 1.0, 0.01)).after == best


def test_faster_wants_separate_quartiles_and_three_percent() -> None:
    assert faster([0.9, 0.91, 0.92], [1.0, 1.01, 1.02])
    assert not faster([0.98, 0.981, 0.982], [1.0, 1.001, 1.002])
    assert not faster([0.5, 0.9, 1.4, 1.5], [0.8, 1.0, 1.0, 1.1])
    assert not faster([1.0, 1.0], [1.0, 1.0])


@interpreted
def test_a_hopeless_candidate_is_timed_once(quick: None) -> None:
    call = call_of("convolution")
    slow = candidates(call.key, ARCH)[3]
    clock = Clock(lambda config: 3.0 if config == slow else 1.0)
    assert measure(call, ARCH, clock).rejected == {slow: "slow"}
    assert clock.heard.count(slow) == 1 and clock.heard.count(heuristic(call.key, ARCH)) == tuning_measure.ROUNDS


@interpreted
@pytest.mark.parametrize("fault", ["one element in a hundred", "an output left unwritten", "an exception"])
def test_a_candidate_that_is_wrong_is_turned_down(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its time would be the best; the other candidates are tried all the same."""
    call = call_of("convolution")
    bad, good = candidates(call.key, ARCH)[1:3]
    right = tuning_measure.compute

    def compute(given: Call) -> list[torch.Tensor]:
        results = right(given)
        if configs.config_for(*given.key[:4], taps=given.key.taps) == bad:
            if fault == "an exception":
                raise RuntimeError("an illegal memory access was encountered")
            flat = results[0].view(-1)
            flat[::100] = torch.nan if "unwritten" in fault else -flat[::100]
        return results

    monkeypatch.setattr(tuning_measure, "compute", compute)
    outcome = measure(call, ARCH, Clock(lambda config: 0.1 if config == bad else 0.5 if config == good else 1.0))
    assert outcome.after == good
    assert list(outcome.rejected) == [bad]
    assert outcome.rejected[bad] == "RuntimeError" if fault == "an exception" else "wrong" in outcome.rejected[bad]


@interpreted
def test_a_default_that_is_wrong_leaves_the_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of("data_gradient", taps=9)
    right = tuning_measure.compute
    monkeypatch.setattr(tuning_measure, "compute", lambda given: [1.1 * result for result in right(given)])
    outcome = measure(call, ARCH, Clock(lambda config: 1.0))
    assert outcome.after == outcome.before and "wrong by" in outcome.wrong


@interpreted
def test_one_stray_element_is_no_error_and_a_stray_row_is() -> None:
    call = call_of("convolution")
    exact = [torch.randn(1000, 200)]
    got = [exact[0].clone()]
    got[0][3, 5] += 0.3
    assert tuning_measure.difference(got, exact, call) == ""
    got = [exact[0].clone()]
    got[0][3] += 0.025
    assert tuning_measure.difference(got, exact, call) == "wrong in some elements"
    assert tuning_measure.difference([torch.full((1, 2), torch.nan)], [torch.ones(1, 2)], call).startswith("wrong")
    assert tuning_measure.difference([torch.ones(2)], [torch.zeros(2)], call) == "wrong"


@interpreted
def test_the_configuration_of_a_table_is_what_others_must_beat(quick: None) -> None:
    call = call_of("convolution")
    default, other, third = (candidates(call.key, ARCH)[i] for i in (0, 3, 4))
    clock = Clock(lambda config: {other: 0.5, third: 0.49}.get(config, 1.0))
    with configs.use_tables({call.key: other}):
        outcome = measure(call, ARCH, clock)
        assert (outcome.before, outcome.after) == (other, other), "third is better by less than 3 %"
        outcome = measure(call, ARCH, Clock(lambda config: 0.4 if config == default else 1.0))
        assert (outcome.before, outcome.after) == (other, default)
        outcome = measure(call, ARCH, clock, {other: "CompilationError"})
        assert (outcome.before, outcome.after) == (other, third)
        outcome = measure(call, ARCH, clock, {other: "no time"})
        assert (outcome.after, outcome.wrong) == (other, "no time")


class Event:
    """A CUDA event that takes the time from this process's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def test_the_timer_is_bounded_and_times_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(tuning_measure, "FLUSH_BYTES", 1000)
    timer = tuning_measure.gpu_timer(torch.device("cpu"), limit=20)
    quick, slow = timer(lambda: None), timer(lambda: time.sleep(0.02))
    assert len(quick) == 25 and len(slow) == 3
    assert max(quick) < min(slow) and min(slow) >= 20


COMPILE = """
import time, torch
import seqconv_triton as sct
from seqconv_triton.tools import tuning_measure
from seqconv_triton.tools.ahead import TARGETS, launches
from seqconv_triton.kernels.configs import LaunchConfig, assume, use_tables
from seqconv_triton.tools.tuning_calls import collect

model = sct.create_model("cifar_seqresnet_b_r7_k16", device="meta")
works = collect(model, (16, 3, 32, 32), torch.bfloat16, "sm_90")
call = min((w.call for w in works if w.key.kernel == "convolution" and w.key.taps == 1), key=lambda call: call.key)
good = LaunchConfig(64, 16, 16, 4, 2)
with assume("sm_90"):
    items = tuning_measure._launches(call, good)

    def judge():
        print(tuning_measure._verdict(items, "sm_90", TARGETS["sm_90"]) or "usable")

    judge()
    limit, tuning_measure.shared_memory = tuning_measure.shared_memory, lambda arch: 100
    judge()
    tuning_measure.shared_memory = limit
    reader, tuning_measure.ahead.machine_code = tuning_measure.ahead.machine_code, lambda compiled: (255, 8, "")
    judge()
    tuning_measure.ahead.machine_code = reader
    late = list(tuning_measure.unusable([call], "sm_90", TARGETS["sm_90"], time.monotonic() - 1))
print(len(late) == len(tuning_measure.contenders(call.key, "sm_90")), {row[2] for row in late} <= {"", "no time"})

table = {call.key: good}
given = model, 32, 16, torch.bfloat16, "sm_90"
plain = launches(*given)
with use_tables(table):
    print(launches(*given) == plain, launches(*given, tables=(table,)) != plain)
"""


def test_compiling_ahead_of_time() -> None:
    """In a process without the interpreter, for a GPU that is not here.

    Candidates are judged before they run, what is late is left out; `kernels` takes the heuristic, or a table it is
    given, whatever is stored for this machine's GPU.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *verdicts, late, tables = done.stdout.splitlines()
    assert verdicts == ["usable", "shared memory", "spills"]
    assert late == tables == "True True"

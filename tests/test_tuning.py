"""The command `tune`: a model's keys and their candidates, what is printed, stored and refused."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is for Linux only")

import seqconv_triton as sct
from seqconv_triton import cli
from seqconv_triton.kernels import configs, launch, tables
from seqconv_triton.kernels.candidates import candidates, fits
from seqconv_triton.kernels.configs import config_for
from seqconv_triton.kernels.heuristic import Key, LaunchConfig, as_fenced, fences_copies, heuristic, loads_ahead
from seqconv_triton.tools import measure, tune
from seqconv_triton.tools.ahead import stage_inputs, stage_passes
from seqconv_triton.tools.measure import Outcome

ARCH, GPU = "sm_90", "Test GPU"
IMAGENET = ("seqresnet_b42", "seqresnet_b22", "seqresnext_24")
PIPELINED = LaunchConfig(64, 64, 64, 4, 3)


@cache
def keys_of(name: str, images: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> set[Key]:
    return {work.key for work in tune.collect(sct.create_model(name, device="meta"), images, dtype, ARCH)}


@pytest.mark.parametrize("name", IMAGENET)
def test_keys_depend_on_neither_batch_nor_image_size(name: str) -> None:
    first = keys_of(name, (64, 3, 224, 224))
    assert first == keys_of(name, (1, 3, 224, 224)) == keys_of(name, (3, 3, 97, 130))
    assert {key._replace(element_size=4) for key in first} == keys_of(name, (2, 3, 64, 64), torch.float32)
    assert 10 < len(first) < 60


def test_evaluation_has_no_keys_of_its_own() -> None:
    for stage, size in stage_inputs(sct.create_model("seqresnext_24", device="meta"), (4, 3, 224, 224)):
        x = torch.empty(size, device="meta", dtype=torch.bfloat16)
        training = {work.key for work in tune.collect(nn.Sequential(stage), tuple(size), x.dtype, ARCH)}
        with launch.listen(measure.ignore), torch.no_grad(), configs.hear_keys() as evaluation:
            for run_pass in stage_passes(stage, x, training=False):
                run_pass()
        assert evaluation and set(evaluation) <= training


def test_collected_launches_are_those_of_a_step() -> None:
    """B42's convolutions counted another way: two a group, one a tail."""
    model = sct.create_model("seqresnet_b42", device="meta")
    works = tune.collect(model, (8, 3, 224, 224), torch.bfloat16, ARCH)
    stages = [stage for stage, _ in stage_inputs(model, (1, 3, 64, 64))]
    groups = sum(len(stage.plan.groups) * (2 if stage.plan.bottleneck else 1) for stage in stages)
    tails = sum(stage.plan.tail is not None for stage in stages)
    assert sum(work.launches for work in works if work.key.kernel == "convolution") == groups + tails
    assert all(0 <= work.position < work.launches and work.call.bytes > 0 for work in works)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["16-bit", "32-bit"])
def test_candidates_are_few_distinct_and_fit(dtype: torch.dtype, arch: str) -> None:
    for name in (*IMAGENET, "cifar_seqresnet_r4_k8"):
        for key in keys_of(name, (2, 3, 64, 64), dtype):
            first, *others = candidates(key, arch)
            assert key.kernel not in configs.WITH_SUMS or first.block_p >= configs.smallest_tile(arch)
            assert first == heuristic(key, arch)
            assert 1 <= len(others) == len({first, *others}) - 1 <= 7
            stages = range(2, 5) if as_fenced(PIPELINED, arch) == PIPELINED else [1]
            for config in (first, *others):
                assert config.block_n == key.block_n and config.num_warps in (4, 8) and config.num_stages in stages
                assert fits(config, key, arch)


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.7.1", "3.10.0+git1a2b3c"])
def test_copies_in_flight_are_fenced_or_there_are_none(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pull request 9610 came with Triton 3.7.1. By rule, measured, stored or pinned: one stage where it is missing."""
    monkeypatch.setattr("triton.__version__", version)
    old, key = version in ("3.6.0", "3.7.0"), Key("convolution", 512, 64, 2, 9)
    for function in (fences_copies, heuristic):
        function.cache_clear()
    try:
        with configs.use_tables({key: PIPELINED}):
            for arch in ("sm_80", "sm_89", "sm_90", "sm_90:NVIDIA H200", "sm_100", "sm_120", "gfx942"):
                one = old and arch[:5] in ("sm_90", "sm_10")
                assert (heuristic(key, arch).num_stages == 1) == one
                assert {config.num_stages == 1 for config in candidates(key, arch)} == {one}
                stored = configs.config_for("convolution", 512, 64, 2, arch, 9)
                with configs.pin("convolution", 64, 64, num_stages=3):
                    pinned = configs.config_for("convolution", 512, 64, 2, arch, 9)
                assert stored == pinned == PIPELINED._replace(num_stages=1 if one else 3)
    finally:
        for function in (fences_copies, heuristic):
            function.cache_clear()


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tables yet, and a place for new ones."""
    monkeypatch.setattr(tables, "cache_directory", lambda: tmp_path)
    configs.reload_tables()
    yield
    configs.reload_tables()


@pytest.fixture
def one_gpu(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that is not here; nothing is compiled for it."""
    monkeypatch.setattr(tune, "compile_ahead", measure.ignore)
    with configs.assume(f"{ARCH}:{GPU}"):
        yield


def arguments_of(**options: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    arguments = parser.parse_args(["cifar_seqresnet_r4_k8", "--dtype", "float32", "--batch", "1"])
    vars(arguments).update(options)
    return arguments


def tuned(monkeypatch: pytest.MonkeyPatch, change: Callable[[Outcome], object], **options: object) -> int:
    """`tune` where every key's second candidate takes half the time, but for what `change` does to an outcome."""

    def measure_stage(works: Any, dtype: Any, device: Any, timer: Any, deadline: float, done: Any) -> None:
        for work in works:
            before, after = candidates(work.key, ARCH)[:2]
            outcome = Outcome(work.key, after, before, 0.01, 0.02, {candidates(work.key, ARCH)[-1]: "wrong by 3e-01"})
            change(outcome)
            done(outcome)

    monkeypatch.setattr(measure, "measure_stage", measure_stage)
    return tune.tune(arguments_of(**options), torch.device("cpu"), GPU, lambda run: (1.0, 1.0, 1.0))


def in_use(key: Key) -> LaunchConfig:
    return config_for(key.kernel, key.reduction, key.block_n, key.element_size, f"{ARCH}:{GPU}", key.taps)


def test_what_changed_is_printed_stored_and_used(
    one_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = keys_of("cifar_seqresnet_r4_k8", (1, 3, 32, 32), torch.float32)
    assert tuned(monkeypatch, measure.ignore) == 0
    printed = capsys.readouterr().out
    assert "20.0 → 10.0 µs  2.00 ×" in printed
    assert f"{len(keys)} of {len(keys)} keys measured, {len(keys)} changed; turned down: {len(keys)} wrong" in printed
    assert all(in_use(key) == candidates(key, ARCH)[1] for key in keys)
    for row in tables.read(tables.user_file(GPU), GPU):
        assert "tune cifar_seqresnet_r4_k8 --dtype float32 --batch 1" in row["provenance"]["command"]

    for best in ({1}, {1, 9}):  # taps of the keys whose heuristic is found best

        def stays(outcome: Outcome, best: set[int] = best) -> None:
            if outcome.key.taps in best:
                outcome.config = outcome.heuristic

        assert tuned(monkeypatch, stays) == 0
        assert {key for key in keys if in_use(key) != heuristic(key, ARCH)} == {k for k in keys if k.taps not in best}


def test_an_interruption_keeps_what_was_measured(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Key] = []

    def interrupted(outcome: Outcome) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(outcome.key)

    with pytest.raises(KeyboardInterrupt):
        tuned(monkeypatch, interrupted)
    assert set(configs.stored_table(tables.user_file(GPU), GPU)) == set(seen)


def test_what_is_wrong_has_no_time_or_no_memory_stays(
    one_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(outcome: Outcome) -> None:
        raise torch.OutOfMemoryError

    assert tuned(monkeypatch, lambda outcome: setattr(outcome, "wrong", "CompilationError")) == 1
    assert "not measured, CompilationError" in capsys.readouterr().out
    assert tuned(monkeypatch, full) == 0
    assert "a smaller --batch" in capsys.readouterr().err
    assert tuned(monkeypatch, measure.ignore, seconds=1e-9) == 0
    assert "0 of " in capsys.readouterr().out and not tables.user_file(GPU).exists()


def test_a_table_that_cannot_be_written_is_printed(
    one_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert tuned(monkeypatch, measure.ignore) == 1
    captured = capsys.readouterr()
    assert "No space left" in captured.err
    assert json.loads(captured.out[captured.out.index('{"format"') :])["gpu"] == GPU


def test_a_broken_table_is_replaced_and_said_so(
    one_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tables.user_file(GPU)
    path.parent.mkdir()
    path.write_text("{")
    with configs.use_tables():
        assert tuned(monkeypatch, measure.ignore) == 0
    assert "it is replaced" in capsys.readouterr().err
    assert configs.stored_table(path, GPU)


def test_export_prints_the_table_alone(
    one_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name=GPU))
    assert cli.main(["tune", "--export"]) == 2
    assert capsys.readouterr().err == "nothing was tuned on Test GPU yet\n"
    assert cli.main(["tune", "--export", "--gpu", "1"]) == 2
    assert "--gpu (1) must be from 0 to 0" in capsys.readouterr().err
    assert tuned(monkeypatch, measure.ignore) == 0
    capsys.readouterr()
    assert cli.main(["tune", "--export", "--gpu"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == tables.read(tables.user_file(GPU), GPU) != []


def test_dry_run_lists_keys_and_says_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "seqresnet_b22", "--dry-run", "--arch", "gfx942", "--batch", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = keys_of("seqresnet_b22", (2, 3, 224, 224))
    assert f"{len(keys)} keys" in lines[0]
    assert sum("; launches in a training step: " in line for line in lines) == len(keys)
    assert lines[-1] == "Nothing was measured."


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune"], "needs a GPU"),
        (["tune", "seqresnet_b42", "--gpu", "0"], "needs a GPU"),
        (["tune", "--export"], "needs a GPU"),
        (["tune", "--batch", "0", "--dry-run"], "--batch (0) must be at least 1"),
        (["tune", "--image-size", "0", "--dry-run"], "--image-size (0) must be at least 1"),
        (["tune", "--seconds", "-1"], "--seconds (-1.0) must be positive"),
        (["tune", "seqresnet_b43", "--dry-run"], "unknown model"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


COMPILE = """
import time, torch, triton
from types import SimpleNamespace
import seqconv_triton as sct
from seqconv_triton.kernels.heuristic import Key
from seqconv_triton.tools import ahead, tune

triton.runtime.driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: ahead.TARGETS["sm_90"]))
model = sct.create_model("cifar_seqresnet_b_r7_k16", device="meta")
works = tune.collect(model, (16, 3, 32, 32), torch.bfloat16, "sm_90")[:2]
all_candidates, tune.candidates = tune.candidates, lambda key, arch: all_candidates(key, arch)[:2]
compiled, build = [], ahead.build

def counted(launch, target):
    if time.monotonic() < deadline:
        compiled.append((launch.num_stages, type(build(launch, target)).__name__))

ahead.build = counted
for seconds in (300, -1):
    deadline = time.monotonic() + seconds
    tune.compile_ahead(works, "sm_90", deadline)
    print(*sorted(compiled))
    compiled.clear()
"""


def test_candidates_are_compiled_ahead_until_the_deadline() -> None:
    """In a process without the interpreter, for a GPU that is not here: two keys, two numbers of stages each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = done.stdout.splitlines()
    stages = ("(2, ", "(3, ") if loads_ahead("sm_90") else ("(1, ",)
    assert first.count("CompiledKernel") == 4 and all(number in first for number in stages)
    assert second == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_tuning_on_a_gpu(own_tables: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A small model, in earnest: every default is right, what changed is stored and still right."""
    assert cli.main(["tune", "cifar_seqresnet_b_r7_k16", "--batch", "16", "--seconds", "30"]) == 0
    assert "keys measured" in capsys.readouterr().out

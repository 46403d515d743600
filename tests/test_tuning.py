"""The command `tune` without a GPU: what it prints, stores and refuses, and the tables it exports."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tuning import ARCH, Clock, interpreted, keys_of

from seqconv_triton import cli
from seqconv_triton.kernels import configs, tuning_tables
from seqconv_triton.kernels.configs import Key, heuristic
from seqconv_triton.kernels.tuning_candidates import candidates
from seqconv_triton.tools import tuning_command, tuning_measure
from seqconv_triton.tools.tuning_calls import Call
from seqconv_triton.tools.tuning_measure import Outcome


@pytest.fixture
def one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The user's table of a GPU that is not here."""
    monkeypatch.setattr(tuning_tables, "cache_directory", lambda: tmp_path)
    configs.reload_tables()
    yield "Test GPU"
    configs.reload_tables()


def outcome_of(key: Key) -> Outcome:
    before, after = candidates(key, ARCH)[:2]
    return Outcome(key, before, after, {before: 0.02, after: 0.01}, {candidates(key, ARCH)[3]: "spills"})


def test_what_changed_is_printed_stored_and_used(one_gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Key("convolution", 512, 64, 2, 1), Key("weight_gradient", 64, 64, 2, 9)
    source = {"date": "2026-01-01"}
    for key in (first, second):
        assert tuning_command.store([outcome_of(key)], one_gpu, source)
    tuning_command.report(
        [outcome_of(first), Outcome(second, *candidates(second, ARCH)[:1] * 2, wrong="wrong")], 9, "X"
    )
    printed = capsys.readouterr().out
    before, after = map(tuning_command.short, candidates(first, ARCH)[:2])
    assert f"{before} → {after}" in printed and "20.0 → 10.0 µs  2.00 ×" in printed
    assert "not measured" in printed and "1 of 9 keys measured, 1 changed; turned down: 1 spills" in printed
    for key in (first, second):
        used = configs.config_for(*key[:4], f"{ARCH}:{one_gpu}", key.taps)
        assert used == candidates(key, ARCH)[1]


def test_a_table_that_cannot_be_written_is_printed(
    one_gpu: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    key = Key("convolution", 512, 64, 2, 1)
    assert not tuning_command.store([outcome_of(key)], one_gpu, {})
    captured = capsys.readouterr()
    assert "No space left" in captured.err
    assert key in tuning_tables.parse(json.loads(captured.out), one_gpu)


def arguments_of(**options: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tuning_command.add_arguments(parser)
    given = parser.parse_args(["cifar_seqresnet_r4_k8", "--dtype", "float32", "--batch", "1"])
    vars(given).update(options)
    return given


@pytest.fixture
def stand_in(one_gpu: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU in a GPU's place: nothing is compiled or computed, times come from a clock made up here."""
    import triton

    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: None))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    for name in ("plain", "compute"):
        monkeypatch.setattr(tuning_measure, name, lambda call: [])
    monkeypatch.setattr(
        tuning_measure,
        "unusable",
        lambda calls, *_: [(call.key, config, "") for call in calls for config in candidates(call.key, ARCH)],
    )
    monkeypatch.setattr(
        tuning_measure, "gpu_timer", lambda device: Clock(lambda c: 0.5 if c.num_stages == 2 and c.block_p > 32 else 1)
    )
    return one_gpu


@interpreted
def test_a_whole_model_is_tuned_twice(stand_in: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The second time everything is as good as it gets: what the first one stored is what others must beat."""
    images, arch = (1, 3, 32, 32), f"{ARCH}:{stand_in}"
    keys = keys_of("cifar_seqresnet_r4_k8", images, torch.float32)
    expected = {key for key in keys if key.kernel != "weight_gradient"}
    with configs.assume(arch):
        assert tuning_command.tune(arguments_of(), torch.device("cpu"), stand_in) == 0
        printed = capsys.readouterr().out
        assert f"{len(keys)} of {len(keys)} keys measured, {len(expected)} changed" in printed
        entries = tuning_tables.read(tuning_tables.user_file(stand_in), stand_in)
        assert set(entries) == expected
        for key, entry in entries.items():
            assert configs.config_for(*key[:4], arch, key.taps) == entry.config != heuristic(key, arch)
            assert "tune cifar_seqresnet_r4_k8 --dtype float32 --batch 1" in entry.provenance["command"]
        assert tuning_command.tune(arguments_of(), torch.device("cpu"), stand_in) == 0
        assert f"{len(keys)} of {len(keys)} keys measured, 0 changed" in capsys.readouterr().out


@interpreted
def test_an_interruption_keeps_what_was_measured(stand_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def interrupted(call: Call, *_: object) -> Outcome:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(call.key)
        return outcome_of(call.key)

    monkeypatch.setattr(tuning_measure, "measure", interrupted)
    with configs.assume(f"{ARCH}:{stand_in}"), pytest.raises(KeyboardInterrupt):
        tuning_command.tune(arguments_of(), torch.device("cpu"), stand_in)
    assert list(tuning_tables.read(tuning_tables.user_file(stand_in), stand_in)) == sorted(measured)


@interpreted
def test_what_there_is_no_time_for_stays(stand_in: str, capsys: pytest.CaptureFixture[str]) -> None:
    with configs.assume(f"{ARCH}:{stand_in}"):
        assert tuning_command.tune(arguments_of(seconds=1e-6), torch.device("cpu"), stand_in) == 0
    assert "0 of " in capsys.readouterr().out
    assert not tuning_tables.user_file(stand_in).exists()


@interpreted
def test_a_wrong_kernel_is_exit_status_1(stand_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: Call, *_: object) -> Outcome:
        return Outcome(call.key, *candidates(call.key, ARCH)[:1] * 2, wrong="wrong by 3e-01")

    monkeypatch.setattr(tuning_measure, "measure", wrong)
    with configs.assume(f"{ARCH}:{stand_in}"):
        assert tuning_command.tune(arguments_of(), torch.device("cpu"), stand_in) == 1


def test_export_prints_the_table_alone(
    one_gpu: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name=one_gpu))
    assert cli.main(["tune", "--export"]) == 2
    assert capsys.readouterr().err == "nothing was tuned on Test GPU yet\n"
    assert cli.main(["tune", "--export", "--gpu", "1"]) == 2
    assert "--gpu (1) must be from 0 to 0" in capsys.readouterr().err
    key = Key("convolution", 512, 64, 2, 1)
    tuning_command.store([outcome_of(key)], one_gpu, {"date": "2026-01-01"})
    capsys.readouterr()
    assert cli.main(["tune", "--export", "--gpu"]) == 0
    entry = tuning_tables.parse(json.loads(capsys.readouterr().out), one_gpu)[key]
    assert entry.provenance == {"date": "2026-01-01"} and entry.config == candidates(key, ARCH)[1]


def test_kernels_with_a_table_that_does_not_ship(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert cli.main(["kernels", "--tuned", "a GPU that nobody has"]) == 2
    assert "no table ships for 'a GPU that nobody has'" in capsys.readouterr().err


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
        (["tune", "--batch", "0"], "--batch (0) must be positive"),
        (["tune", "--seconds", "-1"], "--seconds (-1.0) must be positive"),
        (["tune", "seqresnet_b43", "--dry-run"], "unknown model"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_tuning_on_a_gpu(one_gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A small model, in earnest: every default is right, what changed is stored and still right."""
    assert cli.main(["tune", "cifar_seqresnet_b_r7_k16", "--batch", "16", "--seconds", "30"]) == 0
    assert "keys measured" in capsys.readouterr().out

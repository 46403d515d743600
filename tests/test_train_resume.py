"""Runs that are killed, stopped or interrupted, and go on: to the bits of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import TINY, assert_same_run, run_recipe, tiny

pytest.importorskip("sklearn", reason="the digits")

from recipes.training import Config, checkpoint, train
from recipes.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("resume")  # one worker: they share a run

EXTRAS = dict(accumulate=2, ema=0.9, mixup=0.2, label_smoothing=0.1)  # all that has state or random numbers of its own
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in EXTRAS.items()]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    config = tiny(tmp_path_factory.mktemp("undisturbed"), epochs=4, **EXTRAS)
    train(config)
    return config.output


def test_killed_twice(undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 at a random moment after the first step, often in the middle of writing a checkpoint."""
    command = [
        sys.executable,
        "-m",
        "recipes.train",
        *TINY[1:],
        "--epochs=4",
        *FLAGS,
        "--resume",
        "--checkpoint-steps=1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    last, kills = tmp_path / "last.pt", []
    for attempt in range(3):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = subprocess.Popen(
            [*command, "--output", str(tmp_path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if attempt < 2:
            while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
                time.sleep(0.002)
            delay = random.uniform(0, 0.3)
            time.sleep(delay)
            process.kill()
            state = checkpoint.load(last)  # whole, whenever it was
            kills.append((round(delay, 3), state["epoch"], state["step"]))
        output, _ = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if attempt < 2 else 0), (kills, output.decode())
    assert_same_run(tmp_path, undisturbed)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pt", "last.pt", "log.csv"], kills
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 4


@pytest.mark.parametrize(
    ("number", "status", "in_evaluation"),
    [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)],
    ids=["SIGTERM", "Ctrl-C", "SIGTERM-while-evaluating"],
)
def test_stopped_run_goes_on(
    number: int, status: int, in_evaluation: bool, undisturbed: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from recipes.training.data import DigitsSource

    step, batches, calls = Trainer.step, DigitsSource.val_batches, []

    def step_with_signal(self: Trainer, pieces: object, count: int) -> torch.Tensor:
        calls.append(count)
        if len(calls) == 7 and not in_evaluation:
            signal.raise_signal(number)
        return step(self, pieces, count)

    def batches_with_signal(self: DigitsSource, pieces: object) -> object:
        for batch in batches(self, pieces):
            if len(calls) == 10 and in_evaluation:
                calls.append(0)
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(Trainer, "step", step_with_signal)
    monkeypatch.setattr(DigitsSource, "val_batches", batches_with_signal)
    arguments = [*TINY, "--epochs=4", *FLAGS, "--output", str(tmp_path), "--resume", "--quiet"]
    before = signal.getsignal(number)
    assert run_recipe(arguments) == status
    assert signal.getsignal(number) is before
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"in epoch 2 after step {5 if in_evaluation else 2}; {tmp_path / 'last.pt'} is kept" in message
    assert run_recipe(arguments) == 0
    assert_same_run(tmp_path, undisturbed)


def test_finished_run_is_left_alone(undisturbed: Path) -> None:
    content = (undisturbed / "last.pt").read_bytes()
    outcome = train(tiny(undisturbed, epochs=4, resume=True, **EXTRAS))
    assert outcome.epochs == 4
    assert (undisturbed / "last.pt").read_bytes() == content
    with pytest.raises(ValueError, match="holds a run already"):
        train(tiny(undisturbed, epochs=4, **EXTRAS))


def test_second_interrupt_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(self: Trainer, pieces: object, count: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", impatient)
    assert run_recipe([*TINY, "--output", str(tmp_path), "--quiet"]) == 130
    assert not (tmp_path / "last.pt").exists()


def test_best_checkpoint_is_the_best_epoch(undisturbed: Path) -> None:
    last, best = (checkpoint.load(undisturbed / name) for name in ("last.pt", "best.pt"))
    errors = [row["val_error"] for row in last["log"]]
    assert last["epoch"] == 4 and last["best_error"] == best["best_error"] == min(errors)
    assert best["epoch"] == 1 + errors.index(min(errors))
    assert "optimizer" not in best
    header, *rows = (undisturbed / "log.csv").read_text().splitlines()
    assert header == "epoch,learning_rate,train_loss,train_error,val_loss,val_error,images_per_second,seconds"
    assert [row.split(",")[:2] for row in rows] == [["1", "0.1"], ["2", "0.1"], ["3", "0.01"], ["4", "0.001"]]


def test_api_is_importable() -> None:
    assert Config(epochs=3).recipe.batch_size == 64

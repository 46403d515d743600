"""torchrun in front of the same command: two processes train what one trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import OPTIONS, tiny

pytest.importorskip("sklearn", reason="the digits")

from recipes.training import checkpoint, train

pytestmark = pytest.mark.xdist_group("ranks")

# `-m recipes.train` in float64, so that what is left is rounding and nothing else; the command has no option for it.
# Each process skips an image of its own and one that the other skips, too.
COMMAND = """
import os, runpy, torch
torch.set_default_dtype(torch.float64)
from recipes.training.data import DigitsSource
begin = DigitsSource.__init__
def begin_skipping(self, *arguments):
    begin(self, *arguments)
    self.unreadable += ["both.png", os.environ["RANK"] + ".png"]
DigitsSource.__init__ = begin_skipping
runpy.run_module("recipes.train", run_name="__main__", alter_sys=True)
"""
# 97 images in steps of 21: every step is uneven between the ranks, and the last one is smaller.
SETTINGS = dict(train_images=97, batch_size=21, max_shift=0.0, sync_bn=True)
FLAGS = [
    *("--model=cifar_custom", "--model-options", *(f"{k}={v}" for k, v in OPTIONS.items()), "dropout=0"),
    *("--train-images=97", "--batch-size=21", "--max-shift=0", "--epochs=2", "--device=cpu", "--sync-bn"),
]


def torchrun(folder: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    script = folder / "float64.py"
    script.write_text(COMMAND)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=localhost:0", str(script), *FLAGS, "--output", str(output), *flags),
        ],
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Weights, statistics, momenta and logged figures after ten steps, with synchronised BN."""
    done = torchrun(tmp_path, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout
    assert done.stderr.count("warning: 3 images that do not decode were skipped:\n  both.png\n  0.png\n  1.png\n") == 1
    assert done.stderr.count("both.png") == 2, "by the epoch and at the end"
    try:
        torch.set_default_dtype(torch.float64)
        train(tiny(tmp_path / "one", model_options=OPTIONS | {"dropout": 0}, **SETTINGS))
    finally:
        torch.set_default_dtype(torch.float32)
    two, one = (checkpoint.load(tmp_path / name / "last.pt") for name in ("two", "one"))
    assert one["model"]["norm.weight"].dtype == torch.float64
    tensors = [(name, value, two["model"][name]) for name, value in one["model"].items()]
    momenta = (state["optimizer"]["state"] for state in (one, two))
    tensors += [(f"momentum {i}", a["momentum_buffer"], b["momentum_buffer"])
                for i, (a, b) in enumerate(zip(*(m.values() for m in momenta), strict=True))]  # fmt: skip
    for name, expected, got in tensors:
        # Ten steps at a learning rate of 0.1 amplify rounding (1e-16) by some three or four digits.
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    for name in ("train_loss", "train_error", "val_loss", "val_error"):
        assert [row[name] for row in two["log"]] == pytest.approx([row[name] for row in one["log"]], rel=1e-10)

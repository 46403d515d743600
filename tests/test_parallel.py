"""Data parallelism with real processes: DDP, synchronised BN, FSDP2, elastic restarts. Their work is in ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomise
from torch import nn

import seqconv_triton as sct

facility = pytest.mark.facility
pytestmark = pytest.mark.xdist_group("ranks")  # one worker: they share a run of two processes
HERE = Path(__file__).parent


PLACES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
places = pytest.mark.parametrize("place", PLACES)


def torchrun(what: str, folder: Path, place: str, *options: str) -> None:
    """Two processes: gloo on the CPU, NCCL on two GPUs."""
    if place == "gpu" and torch.cuda.device_count() < 2:
        pytest.skip("no two GPUs here")
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=localhost:0", *options, str(HERE / "ranks.py"), what, str(folder)),
            "cuda" if place == "gpu" else "cpu",
        ],
        capture_output=True, text=True, check=False, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    """Where the two ranks of `folder` have written, by device."""
    return {}


@pytest.fixture
def folder(runs: dict[str, Path], place: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one run of ranks.py, for all tests; the interpreter is on the CPU."""
    device = "gpu" if place == "gpu" else "cpu"
    if device not in runs:
        made = tmp_path_factory.mktemp("ranks")
        torchrun("parallel", made, device)
        runs[device] = made
    return runs[device]


@pytest.fixture
def errors(folder: Path) -> dict[str, float]:
    """The worst error, over both ranks, of everything that ranks.py compares."""
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


@facility("sct.convert_sync_batchnorm under DDP: two ranks equal one with the whole batch")
@places
@pytest.mark.parametrize("batch", ["halves", "uneven"])
@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_synchronised_ranks_equal_one_process(errors: dict[str, float], backend: str, batch: str) -> None:
    assert errors[f"sync {backend} {batch}"] < 1e-10
    assert errors["keys"] == 0


@facility("sct.convert_sync_batchnorm under DDP: two ranks equal one with the whole batch")
@pytest.mark.parametrize("batch", ["halves", "uneven"])
@pytest.mark.parametrize("place", ["interpreter", PLACES[1]])
def test_synchronised_triton_ranks(errors: dict[str, float], batch: str) -> None:
    if f"sync triton {batch}" not in errors:
        pytest.skip("no interpreter here")
    assert errors[f"sync triton {batch}"] < 2e-5


@facility("DistributedDataParallel: own statistics in each rank, static_graph, find_unused_parameters")
@places
@pytest.mark.parametrize("case", ["plain", "static graph", "unused"])
def test_plain_ddp(errors: dict[str, float], case: str) -> None:
    assert errors[case] < 1e-10


@facility("sct.convert_sync_batchnorm under DDP: two ranks equal one with the whole batch")
@places
@pytest.mark.parametrize("case", ["hooks on one rank", "hooks on all ranks"])
def test_hooks_on_synchronised_bns(errors: dict[str, float], case: str) -> None:
    assert errors[case] < 1e-10


@facility("Matrix-wise optimizers (Muon, LARS): sct.parameter_groups(per_group=True) steps as separate convs do")
@places
def test_parts_under_ddp(errors: dict[str, float]) -> None:
    assert errors["parts"] < 1e-10


@facility("Gradient accumulation with no_sync")
@places
def test_gradient_accumulation(errors: dict[str, float]) -> None:
    assert errors["no_sync"] < 1e-12


@facility("FSDP2 (fully_shard), ZeroRedundancyOptimizer")
@places
@pytest.mark.parametrize("case", ["fsdp train", "fsdp eval", "zero"])
def test_fully_sharded(errors: dict[str, float], case: str) -> None:
    assert errors[case] < 1e-10


@facility("torch.compile of a synchronised DDP model")
@places
def test_compiled_ddp(errors: dict[str, float]) -> None:
    assert errors["compiled"] < 1e-9


@facility("A rank killed in mid-epoch: torchrun --max-restarts resumes and ends at the same weights")
@places
def test_killed_rank_resumes(folder: Path, tmp_path: Path, place: str) -> None:
    undisturbed = folder / "undisturbed"
    (tmp_path / "kill").touch()
    torchrun("elastic", tmp_path, place, "--max-restarts=1")
    assert (undisturbed / "starts-0").read_text().split() == ["0"]
    assert (tmp_path / "starts-0").read_text().split() == ["0", "1"]
    states = [torch.load(path / "last.pt", weights_only=True) for path in (undisturbed, tmp_path)]
    assert states[0]["epochs"] == states[1]["epochs"] == 3
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


def test_conversion_keeps_parameters_and_works_alone() -> None:
    """Without a process group a converted model is the model it was."""
    model = randomise(sct.CifarSeqResNet(4, 1, dropout=0.0))
    other = randomise(sct.CifarSeqResNet(4, 1, dropout=0.0))
    parameters = list(other.parameters())
    converted = sct.convert_sync_batchnorm(other)
    assert converted is other
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    assert not any(type(m) is nn.BatchNorm2d for m in other.modules())
    x = torch.randn(2, 3, 8, 8)
    for training in (True, False):
        assert torch.equal(other.train(training)(x), model.train(training)(x))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, not list"):
        sct.convert_sync_batchnorm([1])

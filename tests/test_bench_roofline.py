"""Launches, bytes and FLOPs of stages against numbers by hand; the kernels' cases against PyTorch; the dry run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from helpers import exact_kernels

import seqconv_triton as sct
from bench import bounds, ceilings, dry, kernels, predict, roofline, runner
from bench.cases import KERNELS, Case
from bench.operands import Operands
from seqconv_triton.kernels import configs
from seqconv_triton.plan import Plan, Tail
from seqconv_triton.tools.ceilings import Ceilings, Gpu
from seqconv_triton.tools.cost import Work, pass_work, stage_work

# B42's evaluation at batch 256 in bfloat16 for 4.3 TB/s and 780 TFLOP/s, input and tail left out, with pencil and paper
# from C, k and J groups. With P = 256·image² a group has 2·P·k·(C + 9·k) FLOPs; its 1×1 moves 2·(P·(C + k) + k·C)
# bytes, its 3×3 2·(P·2·k + 9·k²), and 2·P·k more for each shortcut that it reads (those of layers B: 12, 16, 40, 24
# groups) and for each raw output that a later block's shortcut reads (8, 12, 32, 16 groups).
HAND = [
    # stage, image, groups, arithmetic ms, bytes ms, roofline ms
    (1, 56, 28, 0.767, 2.581, 2.581),
    (2, 28, 36, 0.987, 1.674, 1.818),
    (3, 14, 88, 0.788, 1.556, 1.642),
    (4, 7, 48, 0.430, 0.430, 0.553),
]
CEILINGS = Ceilings(4.3e12, 780e12)


@pytest.fixture(scope="module")
def works() -> dict[int, list[Work]]:
    stages = sct.create_model("seqresnet_b42", device="meta").stages
    launches = {}
    for number, size, *_ in HAND:
        stage = stages[number - 1]
        x = torch.empty(256, stage.plan.in_channels, size, size, device="meta", dtype=torch.bfloat16)
        every = stage_work(stage, x, training=False)
        launches[number] = [w for w in every if w.family in ("convolution 1×1", "convolution 3×3")]
        assert [w.family for w in every if w not in launches[number]] == ["elementwise", "convolution tail"]
    return launches


@pytest.mark.parametrize(("number", "size", "groups", "arithmetic", "moved", "least"), HAND)
def test_stages_of_b42(
    works: dict[int, list[Work]], number: int, size: int, groups: int, arithmetic: float, moved: float, least: float
) -> None:
    seconds = roofline.predicted(works[number], CEILINGS)
    assert len(works[number]) == 2 * groups
    assert 1e3 * seconds["arithmetic_seconds"] == pytest.approx(arithmetic, abs=0.0006)
    assert 1e3 * seconds["bytes_seconds"] == pytest.approx(moved, abs=0.0006)
    assert 1e3 * seconds["roofline_seconds"] == pytest.approx(least, abs=0.0006)


SMALL = {
    "bottleneck": Plan.stage(32, 16, 1, extension=32, tail=Tail(64, 3, 2, 4)),
    "subgroups": Plan.stage(32, 16, 1, subgroups=4, extension=32, tail=Tail(64, 3, 2, 16)),
    "basic": Plan.stage(32, 16, 1, bottleneck=False, tail=Tail(32, 1)),
}


@pytest.mark.parametrize("name", SMALL)
def test_operations_are_those_of_the_plan(name: str) -> None:
    """Forward: every multiply-add once. Backward: once for the inputs' gradients, once for the weights'."""
    plan = SMALL[name]
    stage = sct.Stage(plan, device="meta")
    x = torch.empty(3, 32, 8, 8, device="meta", dtype=torch.bfloat16)
    expected = 2 * 3 * sum(plan.multiply_adds(8, 8))
    forward, backward = (sum(w.operations for w in works) for works in pass_work(stage, x, training=True))
    assert forward == expected
    assert backward == 2 * expected
    assert sum(w.operations for w in stage_work(stage, x, training=False)) == expected


def test_bytes_of_single_launches() -> None:
    """Counted by hand: P = 3·8·8 pixels, C = 32, k = 16, two bytes an element, six groups, two with shortcuts."""
    stage = sct.Stage(SMALL["bottleneck"], device="meta")
    x = torch.empty(3, 32, 8, 8, device="meta", dtype=torch.bfloat16)
    forward, backward = pass_work(stage, x, training=True)
    pixels, k, window = 3 * 64, 16, 32
    weights, taps = k * window, 9 * k * k

    def moved(works: list[Work], family: str) -> list[int]:
        return [w.moved for w in works if w.family == family]

    # Window and z; all but the first write their newest k channels, activated, beside.
    first = 2 * (pixels * (window + k) + weights)
    assert moved(forward, "convolution 1×1") == [first] + [first + 2 * pixels * k] * 5
    plain = 2 * (pixels * 2 * k + taps)
    assert sorted(moved(forward, "convolution 3×3")) == [plain] * 4 + [plain + 2 * pixels * k] * 2
    # Read, and the raw 64 channels in front of the tail at every pixel of the input; a quarter of the pixels come out.
    assert moved(forward, "convolution tail") == [2 * (pixels * 64 + pixels // 4 * 64 + 64 * 64 * 9)]
    assert moved(forward, "statistics") == [2 * 2 * pixels * window]
    # The input once; z of six groups; slots: those before a group by its 1×1, the last one by a launch.
    assert sorted(moved(forward, "elementwise")) == [2 * 2 * pixels * k] * 7 + [2 * 2 * pixels * window]
    # The last group's output is read by the tail alone: nothing but its upstream, its raw value and its own g.
    pulls = [w for w in backward if w.family == "pull 1×1"]
    assert (pulls[0].operations, pulls[0].moved) == (0, 2 * 3 * pixels * k)
    # The one before is read by the last group: that one's g and z, its dz written, k×k weights; also upstream, raw, g.
    assert (pulls[1].operations, pulls[1].moved) == (2 * pixels * k * k, 2 * (6 * pixels * k + k * k))
    assert set(moved(backward, "transposed 3×3")) == {2 * (3 * pixels * k + taps)}


@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("name", ["bottleneck", "subgroups"])
def test_kernels_alone_compute_what_torch_does(name: str, family: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel = kernels.FAMILIES[family](Operands(SMALL[name], 2, 5, torch.float32, device))
    with exact_kernels():
        got, expected = kernel.ours(), kernel.torch(torch.float64)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].shape == value.shape
        assert ((got[key] - value).norm() / value.norm()).item() < 1e-5, key


def test_a_kernel_takes_part_beside_torch() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case("kernel statistics, cifar_seqresnet_b_r7_k16 stage 3", False, 1, ("torch plain", "ours plain"), 2, 32)
    rows = runner.run_case(case, device, None)
    assert [row["contender"] for row in rows] == ["torch plain", "ours plain"]
    for row in rows:
        assert len(row["seconds"]) == 2 and row["part"] == "eval" and row["error"] < 1e-5 and "peak_bytes" not in row


@pytest.mark.parametrize("family", KERNELS)
def test_a_kernel_is_one_launch_of_its_family(family: str) -> None:
    works = predict.kernel_work(f"kernel {family}, seqresnet_b22 stage 4", 8, 224, torch.bfloat16)
    assert [w.family for w in works] == [family]


def test_dry_run_claims_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        Case("layer bottleneck", True, 4, ("ours eager",), dtype="bfloat16"),
        Case("kernel convolution 1×1, seqresnet_b22 stage 4", False, 8, ("ours plain",), dtype="bfloat16"),
        Case("cifar_seqresnet_b_r7_k16", False, 8, ("ours eager",), image=32, dtype="bfloat16"),
    ]
    assert dry.dry_run(cases) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert {case.name for case in cases} <= {line.split("  ")[0] for line in lines}
    assert all(line.endswith("  not measured") for line in lines)
    assert len(lines) == 2 + 1 + 1 + 4  # forward and backward; the kernel; the network and its four families


def test_dry_run_knows_its_architectures() -> None:
    with pytest.raises(SystemExit, match="unknown architecture 'sm_1'"):
        dry.dry_run([], "sm_1")


# 1 GB/s, 10 GFLOP/s and a launch of 1 ms: bytes, FLOPs and issue time of each row are easy to see.
def kernel_row(name: str, ms: float, moved: float, operations: float, issue_ms: float) -> dict[str, Any]:
    row = {"subject": f"kernel {name}", "part": "eval", "batch": 8, "dtype": "bfloat16", "contender": "ours plain"}
    counts = {"moved_bytes": moved, "operations": operations, "issue_seconds": issue_ms / 1e3}
    return row | counts | {"seconds": [ms / 1e3], "median": ms / 1e3}


def compared(*rows: dict[str, Any]) -> dict[str, Any]:
    limits = {"bytes_per_second": 1e9, "operations_per_second": 1e10, "launch_seconds": 1e-3}
    return {"ceilings": limits, "rows": list(rows)}


def test_the_bound_that_was_wrong_is_named() -> None:
    contents = compared(
        kernel_row("a", 11, 10e6, 1e7, 2),  # 10 ms of bytes, as long as measured without the launch
        kernel_row("b", 12, 10e6, 1e7, 2),
        kernel_row("c", 41, 10e6, 1e7, 20),  # 20 ms of issue slots, 40 ms measured
        kernel_row("d", 9, 1e6, 1e8, 2),  # 10 ms of FLOPs, 8 ms measured
    )
    found = bounds.compared(contents)
    assert [kernel.bound for kernel in found] == ["bytes", "bytes", "issue", "FLOPs"]
    assert [kernel.times for kernel in found] == pytest.approx([1.0, 1.1, 2.0, 0.8])
    by_bytes, by_operations, by_issue = bounds.verdicts(found)
    assert by_bytes.startswith("bytes: decide 2 of 4 kernels") and by_bytes.endswith("(median 1.05): right")
    assert by_operations.endswith("WRONG, it counts more than d needs")
    assert by_issue.endswith("WRONG, it leaves something out, most in c")
    text, table = bounds.text(contents), bounds.markdown(contents)
    assert all(line in text and f"- {line}" in table for line in (by_bytes, by_operations, by_issue))
    assert "| c | 41 | 10 | 1 | 20 | 2.00 | issue |" in table


def test_rows_hold_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU by family too; a count that fails costs no time its row."""
    case, device = Case("layer basic", True, 2, ("ours eager",), dtype="bfloat16"), torch.device("cuda")
    work = {"forward": [Work("a", 40, 1), Work("b", 2, 2)], "backward": [Work("a", 10, 1)]}
    monkeypatch.setattr(configs, "architecture", lambda _: "sm_90:NVIDIA H200")
    gpu = Gpu(1e3, 1e4)

    def row(part: str) -> dict[str, Any]:
        return runner.prediction("ours eager", part, work, gpu, case, device)

    monkeypatch.setattr(roofline, "countable", lambda *_: False)
    assert row("backward") == {
        "operations": 10, "moved_bytes": 1, "triton_launches": 1, "roofline_seconds": pytest.approx(1e-3)
    }  # fmt: skip
    monkeypatch.setattr(roofline, "countable", lambda *_: True)
    step = row("step")
    assert step["floor_seconds"] == pytest.approx(7e-3) and step["issue_seconds"] == 0
    assert {name: entry["launches"] for name, entry in step["families"].items()} == {"a": 2, "b": 1}
    assert step["families"]["a"]["arithmetic_seconds"] == pytest.approx(5e-3)
    monkeypatch.setattr(roofline, "total", lambda *_: 1 / 0)
    forward = row("forward")
    assert forward["triton_launches"] == 2 and forward["not_counted"].startswith("ZeroDivisionError")
    assert runner.prediction("torch plain", "eval", work, gpu, case, device) == {}
    monkeypatch.setattr(roofline, "countable", lambda *_: False)
    case = replace(case, dtype="float32")
    assert row("backward")["roofline_seconds"] == pytest.approx(2 * 10 / 1e4), "TF32 has half of bfloat16's rate"


def test_ceilings_come_back_from_a_results_file() -> None:
    for limits in (Ceilings(1.0, 2.0), Gpu(1.0, 2.0, 3, 4.0, "a GPU")):
        assert ceilings.restored(asdict(limits) | {"dtype": "bfloat16", "launch_seconds": 5e-6}) == limits
    assert ceilings.restored(None) is None


def test_dry_run_counts_what_it_compiles() -> None:
    """In a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["-m", "bench", "gpu", "--dry-run", "--compile", "sm_90", "--only", "kernel pull 1×1, seqresnet_b42"]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("kernel pull")]
    assert len(lines) == 4
    for line in lines:
        arithmetic, moved, roof, issue, floor = (float(cell) for cell in re.findall(r"([\d.e-]+) ms", line))
        assert roof == max(arithmetic, moved) and floor == max(roof, issue) and issue > 0


def test_nothing_is_said_of_what_was_not_counted() -> None:
    row = {name: value for name, value in kernel_row("a", 11, 1, 1, 1).items() if name != "issue_seconds"}
    assert bounds.text(compared(row)) == bounds.markdown(compared(row)) == ""


def test_issue_slots_are_counted_on_gpus_of_known_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline.launch, "INTERPRETED", False)
    assert roofline.countable("sm_90") and not roofline.countable("gfx942")
    monkeypatch.setattr(roofline.launch, "INTERPRETED", True)
    assert not roofline.countable("sm_90")
    # Without a launch's machine code there is nothing to issue, and the floor is the roofline: 4 ms and 2 ms.
    works = [Work("a", 40, 1), Work("b", 2, 2)]
    seconds = roofline.predicted(works, Gpu(1e3, 1e4), "sm_90")
    assert seconds == pytest.approx(
        {"arithmetic_seconds": 4.2e-3, "bytes_seconds": 3e-3, "roofline_seconds": 6e-3, "issue_seconds": 0,
         "floor_seconds": 6e-3}
    )  # fmt: skip

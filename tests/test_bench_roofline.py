"""Bytes and operations counted by hand; the kernels' cases against PyTorch; the dry run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

import seqconv_triton as sct
from bench import dry, kernels, predict, roofline, runner
from bench.cases import KERNELS, Case
from bench.ceilings import Ceilings
from seqconv_triton.plan import Plan, Tail

# B42 at batch 256 in bfloat16, two kernels a group: worked out by hand from C, k and J for 4.3 TB/s and 750 TFLOP/s,
# every second group with a shortcut. Really only layers B have one (12 of 28, 16 of 36, …): up to 1 % fewer bytes.
HAND = [
    # stage, image, groups, arithmetic ms, bytes ms, µs a launch
    (1, 56, 28, 0.80, 2.51, 45),
    (2, 28, 36, 1.03, 1.61, 25),
    (3, 14, 88, 0.82, 1.51, 9),
    (4, 7, 48, 0.45, 0.42, 6),
]
CEILINGS = Ceilings(4.3e12, 750e12)


@pytest.fixture(scope="module")
def works() -> dict[int, list[roofline.Work]]:
    stages = sct.create_model("seqresnet_b42", device="meta").stages
    found = {}
    for number, size, *_ in HAND:
        stage = stages[number - 1]
        x = torch.empty(256, stage.plan.in_channels, size, size, device="meta", dtype=torch.bfloat16)
        (launches,) = roofline.stage_work(stage, x, training=False)
        found[number] = [w for w in launches if w.family != "convolution tail"]
    return found


@pytest.mark.parametrize(("number", "size", "groups", "arithmetic", "moved", "launch"), HAND)
def test_stages_of_b42(
    works: dict[int, list[roofline.Work]],
    number: int,
    size: int,
    groups: int,
    arithmetic: float,
    moved: float,
    launch: float,
) -> None:
    own = works[number]
    found = roofline.predicted(own, CEILINGS)
    assert len(own) == 2 * groups
    assert 1e3 * found["arithmetic_seconds"] == pytest.approx(arithmetic, abs=0.006)
    assert 0.985 * moved <= 1e3 * found["bytes_seconds"] <= moved + 0.005
    assert 1e6 * found["roofline_seconds"] / len(own) == pytest.approx(launch, abs=1)


def test_sum_over_b42(works: dict[int, list[roofline.Work]]) -> None:
    found = roofline.predicted([w for own in works.values() for w in own], CEILINGS)
    assert 1e3 * found["arithmetic_seconds"] == pytest.approx(3.1, abs=0.05)
    assert 1e3 * found["bytes_seconds"] == pytest.approx(6.1, abs=0.1)
    assert 1e3 * found["roofline_seconds"] == pytest.approx(6.5, abs=0.1)


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
    forward, backward = (sum(w.operations for w in works) for works in roofline.stage_work(stage, x, training=True))
    assert forward == expected
    assert backward == 2 * expected
    (evaluation,) = roofline.stage_work(stage, x, training=False)
    assert sum(w.operations for w in evaluation) == expected


def test_bytes_of_single_launches() -> None:
    """Counted by hand: P = 3·8·8 pixels, C = 32, k = 16, two bytes an element."""
    stage = sct.Stage(SMALL["bottleneck"], device="meta")
    x = torch.empty(3, 32, 8, 8, device="meta", dtype=torch.bfloat16)
    forward, backward = roofline.stage_work(stage, x, training=True)
    pixels = 3 * 64
    assert {w.moved for w in forward if w.family == "convolution 1×1"} == {2 * (pixels * (32 + 16) + 32 * 16)}
    plain = 2 * (pixels * 32 + 16 * 16 * 9)
    assert {w.moved for w in forward if w.family == "convolution 3×3"} == {plain, plain + 2 * pixels * 16}
    (tail,) = [w for w in forward if w.family == "convolution tail"]
    assert tail.moved == 2 * (pixels * 64 + pixels // 4 * 64 + 64 * 16 * 9)
    (statistics,) = [w for w in forward if w.family == "statistics"]
    assert statistics.moved == 2 * pixels * 32
    # The last group's output is read by the tail alone: nothing but its upstream, its raw value and its own g.
    last = next(w for w in backward if w.family == "data gradient 1×1")
    assert (last.operations, last.moved) == (0, 2 * 3 * pixels * 16)


@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("name", ["bottleneck", "subgroups"])
def test_kernels_alone_compute_what_torch_does(name: str, family: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel = kernels.FAMILIES[family](kernels.Operands(SMALL[name], 2, 5, torch.float32, device))
    got, expected = kernel.ours(), kernel.torch(torch.float64)
    assert got.shape == expected.shape
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5


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
    assert len(lines) == 2 + 1 + 1 + 3  # forward and backward; the kernel; the network and its three families


def test_dry_run_knows_its_architectures() -> None:
    with pytest.raises(SystemExit, match="unknown architecture 'sm_1'"):
        dry.dry_run([], "sm_1")

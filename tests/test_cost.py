"""What launches cost at least: instructions counted in machine code, floors of whole models, rooflines of ResNets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from matrix_steps import COUNTED_WITH, STEPS

from bench.floors import DTYPES
from seqconv_triton import cli
from seqconv_triton.tools import peers
from seqconv_triton.tools.ceilings import GPUS, Gpu

pytest.importorskip("triton", reason="Triton is for Linux only")

from seqconv_triton.kernels.tables import triton_version
from seqconv_triton.tools.instructions import Anatomy, Loop, anatomy, issued, warp_operations

pytestmark = pytest.mark.xdist_group("cost")  # one worker: they share what is compiled

# A loop of four instructions with one product, a product behind it that was unrolled, and what only the last program to
# arrive runs, behind the exit after the atomic. The jump to itself and the padding are the assembler's.
SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;              /* 0x0000000000007919 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R12, R8 ;
        /*0030*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R12, R8 ;
        /*0060*/              @!P1 BRA 0x80 ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*0080*/                   ATOMG.E.ADD.STRONG.GPU PT, R5, desc[UR4][R2.64], R7 ;
        /*0090*/               @P2 EXIT ;
        /*00a0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00b0*/               @P0 BRA 0xa0 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
        /*00e0*/                   NOP;
"""
ONE = 2 * 16 * 8 * 16  # FLOPs of the product


def test_anatomy() -> None:
    """Ten instructions to the exit, four of them in the loop; behind it four, and the loop there holds no product."""
    assert anatomy(SASS) == Anatomy(once=6, last=4, loops=(Loop(4, ONE),), operations=ONE)
    unrolled = SASS.replace("@P0 BRA 0x10", "@P0 BRA 0x50")
    assert anatomy(unrolled) == Anatomy(once=10, last=4, loops=(), operations=2 * ONE)
    without_atomic = SASS.replace("ATOMG.E.ADD.STRONG.GPU", "STG.E")
    assert anatomy(without_atomic) == Anatomy(once=10, last=0, loops=(Loop(4, ONE),), operations=ONE)


def test_nested_loops_count_the_inner_one() -> None:
    outer = SASS.replace("@!P1 BRA 0x80", "@!P1 BRA 0x0")
    assert anatomy(outer).loops == (Loop(4, ONE),)


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1684.F32.TF32", 2 * 16 * 8 * 4),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 / 4),
        ("HGMMA.64x32x8.F32.TF32", 2 * 64 * 32 * 8 / 4),
        ("HADD2.BF16", 0),
    ],
)
def test_flops_of_a_warp(opcode: str, expected: float) -> None:
    """Four warps share a wide product, whose size counts all four."""
    assert warp_operations(opcode) == expected


@pytest.mark.parametrize(
    ("parts", "phases", "expected"),
    [
        (Anatomy(100, 64, (), 0), (), 100 + 64 / 32),
        (Anatomy(100, 0, (Loop(10, 2.0),), 0), (12.0,), 100 + 10 * 6),
        (Anatomy(100, 0, (Loop(10, 2.0), Loop(30, 4.0)), 0), (12.0, 8.0), 100 + 10 * 6 + 30 * 2),
        (Anatomy(100, 0, (), 20.0), (12.0, 8.0), 100),
        (Anatomy(100, 0, (Loop(10, 2.0),), 8.0), (8.0, 12.0), 100 + 10 * 6),
        (Anatomy(100, 0, (Loop(10, 2.0),), 8.0), (8.0, 0.0), 100),
        (Anatomy(100, 0, (Loop(10, 2.0),), 2.0), (12.0,), 100 + 10 * 5),
        (Anatomy(100, 0, (Loop(10, 2.0), Loop(30, 4.0)), 0), (20.0,), 100 + 10 + 30 * 4.5),
    ],
    ids=["none", "loop", "two", "unrolled", "first-unrolled", "runs-never", "peeled", "rest-is-the-largest's"],
)
def test_issued(parts: Anatomy, phases: tuple[float, ...], expected: float) -> None:
    assert issued(parts, phases) == expected


# In a process without the interpreter. A model is on the meta device, its kernels are compiled: those that `python -m
# bench floors` has not counted, and every sixteenth of the others, whose count must be what it was.
PROGRAM = """
import functools, json, sys, torch
import seqconv_triton as sct
from bench.floors import DTYPES, FILE, known
from bench.launched import described, fingerprint
from bench.results import read_json
from seqconv_triton.tools import instructions
from seqconv_triton.tools.ceilings import GPUS
from seqconv_triton.tools.cost import by_kernel, model_work, total

counted, anatomies = instructions.of_launch, known(read_json(FILE))

@functools.cache
def of_launch(item, architecture):
    code = fingerprint([described(item)])
    if code in anatomies and int(code, 16) % 16:
        return anatomies[code]
    parts = counted(item, architecture)
    assert parts == anatomies.get(code, parts), (item.name, parts, anatomies[code])
    return parts

instructions.of_launch = of_launch
found = {}
for name in ("seqresnet_b42", "seqresnet_b22", "seqresnext_24"):
    model = sct.create_model(name, device="meta")
    for mode in ("eval", "train"):
        for dtype in sys.argv[1:]:
            gpu = GPUS["sm_90"].in_tf32() if dtype == "float32" else GPUS["sm_90"]
            works = model_work(model, (256, 3, 224, 224), DTYPES[dtype], mode == "train", "sm_90")
            kernels = {
                f"{family} {'×'.join(map(str, tile))}": total(group, gpu, "sm_90").step_instructions
                for (family, tile), group in by_kernel(works).items() if any(tile)
            }
            found[f"{name} {mode} {dtype}"] = [total(works, gpu, "sm_90")._asdict(), kernels]
print(json.dumps(found))
"""

# On sm_90 in bfloat16 at batch 256: ms of the floor, floor over roofline, launches, ms of the bytes.
MODELS = {
    "seqresnet_b42 eval": (9.0, 1.12, 420, 8.3),
    "seqresnet_b42 train": (36.0, 1.35, 1290, 30.0),
    "seqresnet_b22 eval": (4.6, 1.12, 178, 4.3),
    "seqresnet_b22 train": (20.0, 1.35, 565, 16.8),
    "seqresnext_24 eval": (13.8, 1.12, 410, 13.0),
    "seqresnext_24 train": (52.0, 1.35, 1260, 42.2),
}


ONE_COUNT = pytest.mark.xdist_group("counted")  # one worker counts


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # With another Triton no committed count holds, and all kernels of a dtype are minutes.
    dtypes = list(DTYPES) if triton_version() == COUNTED_WITH else ["bfloat16"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *dtypes], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@ONE_COUNT
@pytest.mark.parametrize("case", MODELS)
def test_floors_of_models(case: str, counted: dict[str, Any]) -> None:
    floor, times, launches, moved = MODELS[case]
    total, _ = counted[f"{case} bfloat16"]
    assert 1e3 * total["floor_seconds"] <= floor
    assert 1 <= total["floor_seconds"] / total["roofline_seconds"] <= times
    assert total["launches"] <= launches
    assert 1e3 * total["bytes_seconds"] <= moved


@ONE_COUNT
@pytest.mark.parametrize("case", MODELS)
def test_floors_in_other_dtypes(case: str, counted: dict[str, Any]) -> None:
    """float16 as bfloat16; as TF32, at half the rate of products, float32 may be further from its roofline."""
    if triton_version() != COUNTED_WITH:
        pytest.skip(f"counted with Triton {COUNTED_WITH}")
    floor, times, launches, moved = MODELS[case]
    half, whole = (counted[f"{case} {dtype}"][0] for dtype in ("float16", "float32"))
    assert 1e3 * half["floor_seconds"] <= floor and 1e3 * half["bytes_seconds"] <= moved
    for total, most in ((half, times), (whole, 1.2 if "eval" in case else 1.45)):
        assert 1 <= total["floor_seconds"] / total["roofline_seconds"] <= most and total["launches"] <= launches


@ONE_COUNT
@pytest.mark.parametrize("case", STEPS)
def test_instructions_of_a_matrix_step(case: str, counted: dict[str, Any]) -> None:
    """A line that says more or less than 3 % otherwise belongs into the table anew."""
    if triton_version() != COUNTED_WITH:
        pytest.skip(f"counted with Triton {COUNTED_WITH}")
    _, kernels = counted[f"{case} bfloat16"]
    pairs = {name: (STEPS[case].get(name, 0), round(kernels.get(name, 0))) for name in STEPS[case] | kernels}
    assert {name: pair for name, pair in pairs.items() if pair[1] != pytest.approx(pair[0], rel=0.03)} == {}


def test_command_refuses_what_it_cannot_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert cli.main(["cost", "seqresnet_b22"]) == 2
    assert "nothing can be compiled while kernels are interpreted" in capsys.readouterr().err
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert cli.main(["cost", "seqresnet_b22", "--batch", "0"]) == 2
    assert "--batch (0) must be at least 1" in capsys.readouterr().err


def test_command_prints_kernels_sums_and_peers() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    model = "cifar_seqresnet_r4_k16"  # whose kernels are few
    command = ["-m", "seqconv_triton", "cost", model, "--mode", "eval", "--batch", "64", "--image-size", "64"]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "sm_90, bfloat16, batch 64, 64² pixels" in lines[0]
    assert sum(line.startswith("convolution 3×3") for line in lines) == 1
    (own,) = [line.split() for line in lines if line.startswith(f"{model}  ")]
    _, moved, operations, issue, floor, times, rate = (float(cell.replace(",", "")) for cell in own[2:])
    assert floor >= max(moved, operations, issue) and times >= 1
    assert rate == pytest.approx(64e3 / floor, rel=0.01)
    assert sum(line.startswith("resnet") for line in lines) == 6  # evaluations, with and without BNs


def test_shapes_of_resnets() -> None:
    """By hand: the stem, the second stage's first block, and the published numbers of convs and multiply-adds."""
    every = list(peers.convs("resnet50", 1))
    assert every[0] == (3 * 224**2, 3 * 64 * 49, 64 * 112**2, 118_013_952)
    assert every[11:15] == [
        (256 * 56**2, 256 * 128, 128 * 56**2, 102_760_448),
        (128 * 56**2, 9 * 128**2, 128 * 28**2, 115_605_504),
        (128 * 28**2, 128 * 512, 512 * 28**2, 51_380_224),
        (256 * 56**2, 256 * 512, 512 * 28**2, 102_760_448),
    ]
    for name, count, giga in (("resnet50", 53, 4.09), ("resnet101", 104, 7.80), ("resnet152", 155, 11.51)):
        every = list(peers.convs(name, 1))
        assert len(every) == count
        assert sum(c.multiply_adds for c in every) / 1e9 == pytest.approx(giga, abs=0.005)


@pytest.mark.parametrize(
    ("name", "evaluation", "training"), [("resnet50", 6.3, 22.8), ("resnet101", 9.9, 35.6), ("resnet152", 14.1, 50.3)]
)
def test_rooflines_of_resnets(name: str, evaluation: float, training: float) -> None:
    """At batch 256 in bfloat16, 4.3 TB/s and 780 TFLOP/s."""
    for mode, expected in (("eval", evaluation), ("train", training)):
        assert 1e3 * peers.roofline(name, mode, 256, Gpu()).roofline_seconds == pytest.approx(expected, abs=0.05)


def test_gpus() -> None:
    assert GPUS["sm_90"].issues_per_second == 132 * 4 * 1.755e9
    assert GPUS["sm_90"].roofline(780e9, 1) == 1e-3 and GPUS["sm_90"].roofline(1, 4.3e9) == 1e-3

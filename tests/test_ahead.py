"""Every kernel compiles for GPUs that are not here, uses their matrix units, spills nothing, fits their memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

# One stage of a bottleneck network with wide groups, in a process without the interpreter.
PROGRAM = """
import sys, torch
from seqconv_triton.kernels.ahead import SHARED_LIMIT, compile_launch, launches
from seqconv_triton.layers import Stage
from seqconv_triton.plan import Plan, Tail

class Net(torch.nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.stage = Stage(plan, device="meta")
    def forward(self, x):
        return self.stage(x)

architecture, dtype, kind = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]
plans = {
    "b42": Plan.stage(128, 32, 1, extension=128, tail=Tail(256, 3, 2, 4)),
    "wide": Plan.stage(256, 128, 1, tail=Tail(256, 1)),
    "next": Plan.stage(64, 32, 1, subgroups=8, extension=64, tail=Tail(128, 3, 2, 16)),
}
plan = plans[kind]
seen = set()
for item in launches(Net(plan), 16, 4, dtype, plan.in_channels):
    constants = dict(item.constants)
    key = (item.name, constants.get("KERNEL"), constants.get("GROUP_IN"), constants.get("STATISTICS"))
    if key in seen:
        continue
    seen.add(key)
    result = compile_launch(item, architecture)
    print(item.name, result.instruction, result.spills, result.shared <= SHARED_LIMIT[architecture])
"""

MATRIX = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA", "HMMA"}, "sm_100": {"UTCHMMA", "HMMA"}, "gfx942": {"v_mfma"}}


@pytest.mark.parametrize(
    ("architecture", "dtype", "kind"),
    [
        ("sm_80", "bfloat16", "b42"),
        ("sm_90", "bfloat16", "wide"),
        ("sm_90", "float16", "next"),
        ("sm_100", "bfloat16", "b42"),
        ("gfx942", "bfloat16", "b42"),
    ],
)
def test_kernels_compile(architecture: str, dtype: str, kind: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, architecture, dtype, kind], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} >= {"convolution_forward", "data_gradient", "weight_gradient"}
    for name, instruction, spills, fits in rows:
        if name in ("convolution_forward", "data_gradient", "weight_gradient"):
            assert instruction in MATRIX[architecture], (name, instruction)
        assert spills == "0" and fits == "True", (name, spills, fits)

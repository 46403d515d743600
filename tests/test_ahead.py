"""Every kernel compiles for GPUs that are not here, uses their matrix units, spills nothing, fits their memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

# In a process without the interpreter: the kernels of all ImageNet models; of those that differ only in what they add
# or skip, the one that does most.
PROGRAM = """
import sys, torch
import seqconv_triton as sct
from seqconv_triton.kernels.ahead import SHARED_LIMIT, compile_launch, launches

architecture, dtype = sys.argv[1], getattr(torch, sys.argv[2])
chosen = {}
for name in ("seqresnet_b42", "seqresnet_b22", "seqresnext_24"):
    for item in launches(sct.create_model(name, device="meta"), 224, 32, dtype, architecture):
        constants = dict(item.constants)
        tile = (constants.get(side) for side in ("KERNEL", "WINDOWS", "BLOCK_P", "BLOCK_M", "BLOCK_N", "BLOCK_K"))
        key = (item.name, *tile)
        flags = sum(value is True for value in constants.values())
        if key not in chosen or flags > chosen[key][0]:
            chosen[key] = flags, item
for _, item in chosen.values():
    result = compile_launch(item, architecture)
    print(item.name, result.instruction, result.spills, result.shared <= SHARED_LIMIT[architecture])
"""

MATRIX = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA", "HMMA"}, "sm_100": {"UTCHMMA", "HMMA"}, "gfx942": {"v_mfma"}}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", MATRIX)
def test_kernels_compile(architecture: str, dtype: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, architecture, dtype], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) > 20
    for name, instruction, spills, fits in rows:
        if name in ("convolution_forward", "data_gradient", "weight_gradient"):
            assert instruction in MATRIX[architecture], (name, instruction)
        assert spills == "0" and fits == "True", (name, spills, fits)
    if architecture == "sm_90":  # the wide instruction in most kernels, not only Ampere's
        assert sum(row[1] == "HGMMA" for row in rows) > len(rows) / 2

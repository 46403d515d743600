"""Every kernel compiles for GPUs that are not here, uses their matrix units, spills nothing, fits their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

# In a process without the interpreter: the kernels of all ImageNet models; of those that differ only in what they add
# or skip, the one that does most.
PROGRAM = """
import json, sys, torch
import seqconv_triton as sct
from bench import compiled, results
from seqconv_triton.tools.ahead import SHARED_LIMIT, compile_launch, launches

found = {}
rows = {(row["architecture"], row["dtype"]): row for row in results.read_json(compiled.FILE)["rows"]}
for part, (architecture, dtype) in enumerate(json.loads(sys.argv[1])):
    row = rows[architecture, dtype]
    parts = 16 if not row["faults"] and compiled.holds(row) else 2
    chosen = {}
    models = [("seqresnet_b42", 224), ("seqresnet_b22", 224), ("seqresnext_24", 224)]
    if architecture in ("sm_80", "sm_86"):  # whose narrow tiles have spilled
        models.append(("cifar_seqresnet_b_r7_k16", 32))
    for name, size in models:
        for item in launches(sct.create_model(name, device="meta"), size, 32, getattr(torch, dtype), architecture):
            constants = dict(item.constants)
            sides = "KERNEL", "STRIDE", "WINDOWS", "ROW_TILE", "BLOCK_P", "BLOCK_M", "BLOCK_N", "BLOCK_K"
            key = (item.name, *(constants.get(side) for side in sides))
            flags = sum(kind != "constexpr" for _, kind in item.signature)
            if key not in chosen or flags > chosen[key][0]:
                chosen[key] = flags, item
    lines = found[f"{architecture} {dtype}"] = []
    for _, item in list(chosen.values())[part % parts :: parts]:
        result = compile_launch(item, architecture)
        fits = result.shared <= SHARED_LIMIT[architecture]
        lines.append([item.name, result.instruction, result.spills, fits, result.narrow_loads, str(item.constants)])
    assert len(lines) >= len(chosen) // parts > 0
print(json.dumps(found))
"""

# The kernels do not depend on batch and image size, nor on how many groups a dense layer has.
SAME_KERNELS = """
import torch
import seqconv_triton as sct
from seqconv_triton.tools.ahead import launches

def found(name, size, batch, dtype=torch.bfloat16):
    return set(launches(sct.create_model(name, device="meta"), size, batch, dtype, "sm_90"))

assert found("seqresnet_b22", 224, 32) == found("seqresnet_b22", 200, 17)
print(len(found("seqresnet_b42", 224, 1)), len(found("cifar_seqresnet_dense_r3_k8_n121", 32, 1)))
"""

MATRIX = {
    "sm_80": {"HMMA"},
    "sm_86": {"HMMA"},
    "sm_89": {"HMMA"},
    "sm_90": {"HGMMA", "HMMA"},
    "sm_100": {"UTCHMMA", "HMMA"},
    "sm_120": {"HMMA"},
    "gfx942": {"v_mfma"},
}
# Every architecture, and every dtype; of each every second kernel, or every sixteenth where `python -m bench compiled`
# has compiled all of these very kernels, which takes it hours. float32 is TF32 here, as PyTorch's convolutions are.
COMPILED = [
    ("sm_80", "bfloat16"), ("sm_86", "float16"), ("sm_89", "float32"), ("sm_90", "bfloat16"), ("sm_90", "float32"),
    ("sm_100", "float16"), ("sm_120", "bfloat16"), ("gfx942", "bfloat16"),
]  # fmt: skip


def without_interpreter(program: str, *arguments: str) -> str:
    """What a program prints in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[Any]]:
    """What one process has compiled, for all architectures."""
    found: dict[str, list[Any]] = json.loads(without_interpreter(PROGRAM, json.dumps(COMPILED)))
    return found


@pytest.mark.xdist_group("ahead")
@pytest.mark.parametrize(("architecture", "dtype"), COMPILED)
def test_kernels_compile(architecture: str, dtype: str, compiled: dict[str, list[Any]]) -> None:
    rows = compiled[f"{architecture} {dtype}"]
    for name, instruction, spills, fits, narrow, constants in rows:
        if name in ("convolution", "transposed", "pull", "weight_gradient"):
            assert instruction in MATRIX[architecture], (name, instruction)
            assert narrow == 0, f"{name} loads single elements {narrow} times: the compiler does not know an alignment"
        assert spills == 0 and fits, (name, spills, fits, constants)
    if architecture == "sm_90":  # the wide instruction in most kernels, not only Ampere's
        assert sum(row[1] == "HGMMA" for row in rows) > len(rows) / 2


def test_few_kernels_for_any_batch_and_image() -> None:
    """Every kernel costs a user a second of compilation at the first step.

    Evaluation and training have kernels of their own: one activates in its epilogue, the other takes statistics.
    """
    b42, dense = map(int, without_interpreter(SAME_KERNELS).split())
    assert b42 <= 98 and dense <= 43


# Nothing is compiled: every second kernel spills, and a row is kept as long as the launches are what they were.
KEPT_ROWS = """
import argparse, itertools, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import seqconv_triton as sct
from bench import compiled, results
from seqconv_triton.kernels import configs
from seqconv_triton.tools import ahead

count = itertools.count()

def pretend(item, architecture):
    return ahead.Compiled(item, 99, 8 * (next(count) % 2), 1024, "HMMA", 128, 0, 0.5)

ahead.compile_launch = pretend
sct.list_models = lambda: ["cifar_seqresnet_r4_k8"]
row = compiled.compile_pair("sm_80", "bfloat16", None)
assert row["kernels"] == next(count) > 10 and len(row["faults"]) == row["kernels"] // 2
assert "convolution of cifar_seqresnet_r4_k8: spills 8 bytes; " in " ".join(row["faults"])
text = compiled.markdown({"models": ["m"], "rows": [row]})
assert f"| sm_80, bfloat16 | {row['kernels']} | " in text and text.count("spills 8 bytes") == len(row["faults"])
assert compiled.compile_pair("sm_80", "bfloat16", row) is row
assert compiled.compile_pair("sm_80", "float16", row) is not row

# A command for one pair leaves the others' rows, and takes up its own unless it is to be compiled afresh.
compiled.ProcessPoolExecutor = lambda jobs, context: ThreadPoolExecutor(jobs)
compiled.FILE = Path(tempfile.mkdtemp()) / "compiled.json"
other = {**row, "architecture": "sm_90"}
results.write_json(compiled.FILE, {"models": ["m"], "rows": [{**row, "seconds": 999}, other]})
for options, kept in (([], True), (["--fresh"], False)):
    parser = argparse.ArgumentParser()
    compiled.add_arguments(parser)
    wanted = ["--arch", "sm_80", "--dtype", "bfloat16", "--jobs", "1"]
    assert compiled.run_from_arguments(parser.parse_args([*wanted, *options])) == 1
    now, beside = results.read_json(compiled.FILE)["rows"]
    assert beside == other and (now["seconds"] == 999) == kept, (now, options)
with configs.use_tables({}), configs.pin("pull", 16, 16):
    assert compiled.compile_pair("sm_80", "bfloat16", row) is not row
"""


def test_rows_of_what_is_compiled_are_kept() -> None:
    without_interpreter(KEPT_ROWS)

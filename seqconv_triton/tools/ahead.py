"""Ahead-of-time compilation of every kernel that a model launches, for a GPU that need not be there.

The model runs on meta tensors, each launch is noted instead of made, and the distinct ones are compiled as Triton's own
cache would find them. What the compiler made of them is read from the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqconv_triton.backend.contract import Convs, Needs, StageArguments, empty_outputs, with_statistics
from seqconv_triton.backend.triton import backward as backward_pass
from seqconv_triton.backend.triton import forward as forward_pass
from seqconv_triton.kernels import launch
from seqconv_triton.kernels.candidates import shared_memory
from seqconv_triton.kernels.configs import Table, assume, use_tables
from seqconv_triton.kernels.configs import architecture as device_architecture
from seqconv_triton.nn.layers import PackedSeqConv

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program may have, bytes.
SHARED_LIMIT = {architecture: shared_memory(architecture) for architecture in TARGETS}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
# The matrix instructions, as PTX or AMD's assembly calls them, and as the machine code does.
MATRIX_INSTRUCTIONS = {"wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA", "mma.sync": "HMMA", "v_mfma": "v_mfma"}


@dataclass(frozen=True)
class Launch:
    """What distinguishes one compilation from another."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    small: tuple[int, ...]  # tensors below 2 GiB, which AMD's compiler then addresses through buffers; else none
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).removesuffix("_kernel")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch; `instruction` is the matrix instruction.

    `spills` are the bytes of a thread's stack, where NVIDIA's compiler puts what it spills; on AMD, spilled registers.
    `load_bits` is the widest load from global memory, `narrow_loads` the number of instructions that load 16 bits.
    """

    launch: Launch
    registers: int
    spills: int
    shared: int
    instruction: str
    load_bits: int
    narrow_loads: int
    occupancy: float


def describe(kernel: Any, arguments: dict[str, Any]) -> Launch:
    """A launch as Triton specialises it: multiples of 16 are known as such, a 1 and None are constants."""
    signature, constants, divisible, small = [], [], [], []
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialised, kind, aligned = not parameter.do_not_specialize, "constexpr", False
        if isinstance(value, Tensor):
            kind, aligned = POINTERS[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
            if device_architecture(value.device).startswith("gfx") and value.untyped_storage().nbytes() < 2**31:
                small.append(position)
        elif isinstance(value, float):
            kind = "fp32"
        elif value is not None and not parameter.is_constexpr and not (value == 1 and specialised):
            kind, aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0 and specialised
        if kind == "constexpr":
            constants.append((name, value))
        signature.append((name, kind))
        if aligned:
            divisible.append(position)
    return Launch(
        kernel, tuple(signature), tuple(constants), tuple(divisible), tuple(small),
        arguments.get("num_warps", 4), arguments.get("num_stages", 3),
    )  # fmt: skip


def launches(
    model: nn.Module,
    image_size: int,
    batch: int,
    dtype: torch.dtype,
    architecture: str,
    in_chans: int = 3,
    tables: tuple[Table, ...] = (),
) -> list[Launch]:
    """The distinct launches of a training step and an evaluation of `model`, which is on the meta device.

    Configured by the heuristic, but for what is in `tables` (`configs.shipped` reads one).
    """
    found: dict[Launch, None] = {}

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        found[describe(kernel, arguments)] = None

    images = (batch, in_chans, image_size, image_size)
    with launch.listen(note), assume(architecture), use_tables(*tables), torch.no_grad():
        for stage, size in stage_inputs(model, images):
            x = torch.empty(size, device="meta", dtype=dtype)
            for training in (True, False):
                for run_pass in stage_passes(stage, x, training):
                    run_pass()
    return list(found)


def stage_inputs(model: nn.Module, images: tuple[int, ...]) -> list[tuple[PackedSeqConv, torch.Size]]:
    """Every layer or stage of `model`, which is on the meta device, and the size of its input for such images."""
    found: list[tuple[PackedSeqConv, torch.Size]] = []

    def note(stage: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        assert isinstance(stage, PackedSeqConv)
        found.append((stage, inputs[0].shape))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, PackedSeqConv)]
    try:
        with torch.no_grad():
            model.train()(torch.empty(images, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def stage_passes(
    stage: PackedSeqConv, x: Tensor, training: bool, *, mask: Tensor | None = None
) -> list[Callable[[], None]]:
    """Forward, and in training backward, of one stage on meta tensors, straight through the backend."""
    plan, keep_inner = stage.plan, training and not stage.recompute
    norms, _ = stage.train().norms()
    convs = Convs(*(None if w is None else w.detach().to(x.dtype) for w in stage.convs()))  # type: ignore[arg-type]
    arguments = StageArguments(plan, convs, norms, "batch" if training else "running", stage.eps, mask)

    def forward() -> None:
        with torch.no_grad():
            forward_pass.forward(x, None, arguments, keep=training, keep_inner=keep_inner)

    out, buffer, z, statistics = empty_outputs(x, arguments, keep=training, keep_inner=keep_inner)
    if buffer is None or statistics is None:
        return [forward]
    behind = arguments._replace(norms=with_statistics(norms, statistics))
    needs = Needs(x=True, shortcut=False, reduce_weight=True, transform_weight=True, tail_weight=True)

    def backward() -> None:
        with torch.no_grad():
            backward_pass.backward(torch.empty_like(out), None, buffer, z, behind, needs)

    return [forward, backward]


def build(item: Launch, target: GPUTarget) -> Any:
    """Compile for a target; the result also lands in Triton's cache."""
    attributes: dict[Any, list[Any]] = {(position,): [["tt.divisibility", 16]] for position in item.divisible}
    for position in item.small:
        attributes.setdefault((position,), []).append(["tt.pointer_range", 32])
    source = ASTSource(item.kernel, dict(item.signature), dict(item.constants), attributes)
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages}
    return triton.compile(source, target=target, options=options)


def compile_launch(item: Launch, architecture: str) -> Compiled:
    """Compile for a named architecture and read what came out: PTX, or AMD's assembly, and the assembler's report."""
    compiled = build(item, TARGETS[architecture])
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills = (_number(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count"))
        loads = [32 * int(n) for n in re.findall(r"(?:buffer|global)_load_dwordx(\d)", text)]
        narrow = len(re.findall(r"(?:buffer|global)_load_(?:u?short|[us]16)", text))
    else:
        text, usage = compiled.asm["ptx"], cuobjdump("-res-usage", compiled.asm["cubin"])
        registers, spills = (_number(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK"))
        loads = [int(n) * int(bits) for n, bits in re.findall(r"\bld\.global(?:\.\w+)*\.v(\d)\.b(\d+)", text)]
        loads += [8 * int(n, 0) for n in re.findall(r"\bcp\.async\.c[ag]\.[^;]*?\], (\w+)", text)]
        narrow = len(re.findall(r"\bld\.global(?:\.(?!v\d)\w+)*\.[bsu]16\b", text))
    instruction = next((name for known, name in MATRIX_INSTRUCTIONS.items() if known in text), "-")
    return Compiled(
        item, registers, spills, shared, instruction, max(loads, default=32), narrow,
        occupancy(architecture, registers, shared, item.num_warps),
    )  # fmt: skip


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def cuobjdump(option: str, cubin: bytes) -> str:
    """What NVIDIA's tool says about a cubin: -res-usage, registers and stack; -sass, its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def occupancy(architecture: str, registers: int, shared: int, warps: int) -> float:
    """Predicted share of a multiprocessor's warp slots, from registers and shared memory."""
    if architecture == "gfx942":  # 512 vector registers a lane, 8 waves a SIMD of four, 64 KiB of shared memory
        waves = min(8, 512 // max(1, -(-registers // 8) * 8))
        programs = min(waves * 4 // warps, 64 * 1024 // max(1, shared))
        return programs * warps / 32
    per_warp = -(-registers * 32 // 256) * 256
    programs = min(65536 // max(1, per_warp * warps), (SHARED_LIMIT[architecture] + 1024) // (shared + 1024), 32)
    return min(1.0, programs * warps / 64)


def compile_all(items: list[Launch], architecture: str) -> Iterator[Compiled]:
    for item in items:
        yield compile_launch(item, architecture)

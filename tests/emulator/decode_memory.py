"""What an instruction means: loads, stores, atomics, asynchronous copies, matrices and their products."""

from __future__ import annotations

import re

from emulator.decode import Instruction, type_number
from emulator.operands import ABSENT, PARAMETER, WIDTH, split, vector

ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
# Registers of operand A of `mma.sync`, by shape and type.
MMA_LEFT = {
    ("m16n8k16", "f16"): 4, ("m16n8k8", "f16"): 2, ("m16n8k16", "bf16"): 4, ("m16n8k8", "bf16"): 2,
    ("m16n8k8", "tf32"): 4, ("m16n8k4", "tf32"): 2,
}  # fmt: skip
POINTER = {"shared": 4, "global": 8}  # bytes
BASE = 8  # the operand that holds an address


def space_of(i: Instruction) -> str:
    """shared or global; generic addresses are refused."""
    (found,) = {word.partition("::")[0] for word in i.parts} & {"shared", "global"}
    i.belongs_to(found)
    return found


def accesses(i: Instruction, space: str, size: int) -> None:
    sizes = i.tables.shared_sizes if space == "shared" else i.tables.global_sizes
    sizes.add(size)


def load_or_store(i: Instruction) -> None:
    if "param" in i.parts:
        load_parameter(i)
        return
    space = space_of(i)
    value, where = i.operands if i.parts[0] == "ld" else reversed(i.operands)
    registers = vector(value)
    i.count, i.size = len(registers), i.width
    if i.type[0] == "s":
        i.flag("SIGN_EXTENDED")
    wide = i.width == 8 or any(i.tables.slots.is_wide(r) for r in registers)
    if wide:
        i.flag("WIDE")
    accesses(i, space, i.width)
    base, i.immediate = i.tables.slots.address(where, POINTER[space])
    i.use(f"{i.parts[0]}_{space}", *(i.slot(r, 8 if wide else i.width) for r in registers))
    i.slots[BASE] = base


def load_parameter(i: Instruction) -> None:
    into, where = i.operands
    name, _, offset = where[1:-1].replace(" ", "").partition("+")
    if offset not in ("", "0"):
        i.refuse()
    held = i.tables.parameters[name]
    source = i.tables.slots.preset(PARAMETER, WIDTH[held], list(i.tables.parameters).index(name))
    if i.tables.slots.is_wide(into) and i.width < 8:  # extended
        i.how, i.extra = type_number(i.type), type_number("s64")
        i.use("cvt", i.slot(into, 8), source)
    else:
        i.use(f"mov_b{8 * i.width}", i.slot(into, i.width), source)


def atomic(i: Instruction) -> None:
    space = space_of(i)
    if i.parts[0] == "red":
        i.operands.insert(0, "_")
    i.how, i.extra, i.size = i.which(*ATOMICS), type_number(i.type), i.width
    for word, flags in {"acquire": ["ACQUIRE"], "release": ["RELEASE"], "acq_rel": ["ACQUIRE", "RELEASE"]}.items():
        if word in i.parts:
            for flag in flags:
                i.flag(flag)
    accesses(i, space, i.width)
    base, i.immediate = i.tables.slots.address(i.operands[1], POINTER[space])
    i.use(f"atom_{space}", i.slot(i.operands[0], i.width), base, *(i.slot(o, i.width) for o in i.operands[2:]))


def copy(i: Instruction) -> None:
    """cp.async and its groups; bulk copies and mbarriers are refused."""
    i.belongs_to("copy")
    words = set(i.parts[2:])
    if "commit_group" in words:
        i.use("cp_commit")
    elif "wait_group" in words:
        i.immediate = int(i.operands[0], 0)
        i.use("cp_wait")
    elif "wait_all" in words:
        i.use("cp_wait_all")
    elif words & {"ca", "cg"}:
        to, i.immediate = i.tables.slots.address(i.operands[0], POINTER["shared"])
        source, i.extra = i.tables.slots.address(i.operands[1], POINTER["global"])
        i.size = int(i.operands[2], 0)
        accesses(i, "shared", i.size)
        accesses(i, "global", min(i.size, 4))
        i.use("cp_async", to, source, i.slot(i.operands[3], 4) if len(i.operands) > 3 else ABSENT)
    else:
        i.refuse()


def move_matrices(i: Instruction) -> None:
    """ldmatrix and stmatrix: 8×8 matrices of 16 bits."""
    if "m8n8" not in i.parts or i.type != "b16":
        i.refuse()
    i.belongs_to("shared")
    value, where = i.operands if i.parts[0] == "ldmatrix" else reversed(i.operands)
    registers = vector(value)
    i.count = (1, 2, 4)[i.which("x1", "x2", "x4")]
    if "trans" in i.parts:
        i.flag("TRANSPOSED")
    accesses(i, "shared", 16)
    base, i.immediate = i.tables.slots.address(where, POINTER["shared"])
    i.use(i.parts[0], *(i.slot(r, 4) for _, r in zip(range(i.count), registers, strict=True)))
    i.slots[BASE] = base


def multiply(i: Instruction) -> None:
    """mma.sync with float32 accumulators."""
    i.belongs_to("mma")
    (shape,) = (word for word in i.parts if re.fullmatch(r"m\d+n\d+k\d+", word))
    result, left_type, right_type, added = i.parts[-4:]
    if (result, added) != ("f32", "f32") or left_type != right_type:
        i.refuse()
    i.count, i.size = MMA_LEFT[shape, left_type], int(shape.partition("k")[2])
    into, left, right, add = (i.tables.slots.all(operand, 4) for operand in i.operands)
    absent = [ABSENT] * 4
    i.use(f"mma_{left_type}", *into, *(left + absent)[:4], *(right + absent)[:2], *add)


def multiply_warpgroup(i: Instruction) -> None:
    """wgmma with float32 accumulators, and its groups."""
    i.belongs_to("sync")
    if i.parts[1] == "fence":
        i.use("nop")
    elif i.parts[1] == "commit_group":
        i.use("wgmma_commit")
    elif i.parts[1] == "wait_group":
        i.immediate = int(i.operands[0], 0)
        i.use("wgmma_wait")
    else:
        start_product(i)


def start_product(i: Instruction) -> None:
    i.belongs_to("mma")
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4])
    result, left_type, right_type = i.parts[5:8]
    if shape is None or result != "f32" or left_type != right_type or left_type not in ("f16", "bf16", "tf32"):
        i.refuse()
        return
    into, left, right, accumulate, *options = i.operands
    i.count, i.size = int(shape.group(1)), int(shape.group(2))
    i.how = type_number("f32" if left_type == "tf32" else left_type)
    left_sign, right_sign, *transposes = (int(option) for option in options)
    i.immediate = int(left_sign < 0) | int(right_sign < 0) << 1
    if left.startswith("{"):
        left_slots = [i.slot(r, 4) for r in split(left[1:-1])]
    else:
        i.flag("LEFT_SHARED")
        left_slots = [i.slot(left, 8), ABSENT, ABSENT, ABSENT]
    # Operand A has a transposition of its own only where it lies in shared memory.
    if transposes and transposes[-1]:
        i.flag("TRANSPOSED")
    if len(transposes) == 2 and transposes[0]:
        i.flag("LEFT_TRANSPOSED")
    i.extra = len(i.tables.lists)
    i.tables.lists += i.tables.slots.all(into, 4)
    accesses(i, "shared", 4 if left_type == "tf32" else 2)
    i.use("wgmma", *left_slots, i.slot(right, 8), i.slot(accumulate, 4))


MEMORY_DECODERS = {
    "ld": load_or_store, "st": load_or_store, "atom": atomic, "red": atomic, "cp": copy, "ldmatrix": move_matrices,
    "stmatrix": move_matrices, "mma": multiply, "wgmma": multiply_warpgroup,
}  # fmt: skip

"""How many instructions a warp of a kernel issues, counted from its machine code (SASS); no GPU is needed.

A loop with matrix instructions runs as often as its launch has matrix work for; everything else counts once a program.
What lies behind the first exit after an atomic is run by the last of FAN programs to arrive (`kernels/statistics.py`).
Best case everywhere: one instruction a scheduler and cycle, no latency, no conflicts, no replays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

from seqconv_triton.kernels.launch import FAN
from seqconv_triton.tools.ahead import TARGETS, Launch, build, cuobjdump

MATRIX = ("HGMMA", "HMMA")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)([^;]*);")


class Loop(NamedTuple):
    """An innermost loop with matrix instructions: its instructions, and what they multiply in one warp, in FLOPs."""

    instructions: int
    operations: float


class Anatomy(NamedTuple):
    """Instructions outside of matrix loops, those behind the arrival of the last program, and the loops in order.

    `operations` are those of the matrix instructions outside of loops, which the assembler has unrolled.
    """

    once: int
    last: int
    loops: tuple[Loop, ...]
    operations: float


def warp_operations(opcode: str) -> float:
    """FLOPs of a matrix instruction in one warp; four warps share an HGMMA."""
    sizes = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
    if sizes:
        m, n, k = map(int, sizes.groups())
        return 2 * m * n * k / (4 if opcode.startswith("HGMMA") else 1)
    sizes = re.search(r"\.(16)(8|16)(4|8|16|32)(?!\d)", opcode)
    if sizes is None:
        return 0
    m, n, k = map(int, sizes.groups())
    return 2 * m * n * k


def anatomy(code: str) -> Anatomy:
    """Of a kernel's disassembly."""
    found = sorted((int(at, 16), opcode, rest) for at, opcode, rest in INSTRUCTION.findall(code))
    found = [entry for entry in found if entry[1] != "NOP"]
    atomics = [at for at, opcode, _ in found if opcode.startswith(("ATOMG", "ATOM."))]
    exits = [at for at, opcode, _ in found if opcode == "EXIT" and atomics and at > atomics[0]]
    end = exits[0] if exits else found[-1][0]
    jumps = []
    for at, opcode, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target is not None and int(target.group(1), 16) < at <= end:
            jumps.append((int(target.group(1), 16), at))
    products = [(at, warp_operations(opcode)) for at, opcode, _ in found if opcode.startswith(MATRIX)]
    spans = [span for span in jumps if any(span[0] <= at <= span[1] for at, _ in products)]
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    loops = tuple(
        Loop(
            sum(first <= at <= last for at, _, _ in found),
            sum(operations for at, operations in products if first <= at <= last),
        )
        for first, last in sorted(inner)
    )
    hot = sum(at <= end for at, _, _ in found)
    loose = sum(operations for at, operations in products if not any(a <= at <= b for a, b in inner))
    return Anatomy(hot - sum(loop.instructions for loop in loops), len(found) - hot, loops, loose)


@cache
def of_launch(item: Launch, architecture: str) -> Anatomy:
    """Compiles what is not in Triton's cache."""
    return anatomy(cuobjdump("-sass", build(item, TARGETS[architecture]).asm["cubin"]))


def prepare(items: Iterable[Launch], architecture: str) -> None:
    """Several at once, since each waits for the assembler and the disassembler: `of_launch` then knows them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda item: of_launch(item, architecture), set(items)))


def issued(parts: Anatomy, phases: tuple[float, ...]) -> float:
    """Instructions that a warp issues in one program, on average.

    `phases` are the FLOPs of one warp, padding of tiles included, of each loop in the order of the kernel; where the
    assembler has unrolled some, the rest is the largest loop's.
    """
    total = parts.once + parts.last / FAN
    if len(parts.loops) == len(phases) and not parts.operations:
        return total + sum(
            loop.instructions * work / loop.operations for loop, work in zip(parts.loops, phases, strict=True)
        )
    if parts.loops:
        main = max(parts.loops, key=lambda loop: loop.operations)
        rest = sum(loop.instructions for loop in parts.loops if loop is not main)
        left = max(
            0.0, sum(phases) - parts.operations - sum(loop.operations for loop in parts.loops if loop is not main)
        )
        total += rest + main.instructions * left / main.operations
    return total

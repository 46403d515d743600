"""What can be read from a kernel's text alone, without executing it.

- Registers of a wgmma that are written again before its product is waited for: Triton's issue 9433. A dot whose left
  side lies in registers, pipelined, may overwrite them while the matrix unit still reads; whether ptxas saves it is a
  question of its version. All paths are followed, from every such product to its wait.
- Guards, addresses and sizes of copies in registers that nothing writes: LLVM's poison, from a shift by a negative
  number in a step that a pipeline peeled off, for instance. Whatever the GPU's register holds is then taken for it.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from emulator.build import names, numbers
from emulator.decode_memory import BASE
from emulator.operands import ABSENT
from emulator.ptx import Kernel

UNDEFINED = "guard, address or size in a register that nothing writes"
UNFENCED = "shared bytes not fenced for the asynchronous proxy"  # as the machine says
REWRITTEN = "operand registers of a wgmma rewritten before its wait"
MOST_GROUPS = 16  # in flight at a time: more are not told apart


@cache
def read(kernel: Kernel) -> tuple[tuple[str, int, int], ...]:
    """What is wrong with a text: the finding, the instruction, and the one it stands against or itself."""
    reader = _Reader(kernel)
    everything = range(len(kernel.code))
    written = {slot for pc in everything for slot in reader.written(pc)} | set(map(int, kernel.presets[:, 0]))
    undefined = [(UNDEFINED, pc, pc) for pc in everything if not reader.controls(pc) <= written]
    return (*undefined, *((REWRITTEN, pc, by) for pc in everything for by in reader.overwrites(pc)))


def products_from_registers(kernel: Kernel) -> int:
    """How many products take their left side from registers."""
    reader = _Reader(kernel)
    return sum(reader.is_register_product(pc) for pc in range(len(kernel.code)))


class _Reader:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        fields = numbers("fields")
        self.column = {name: kernel.code[:, at] for name, at in fields.items()}
        self.operands: np.ndarray = kernel.code[:, len(fields) :]
        self.ops = [names("ops")[number] for number in self.column["op"]]
        self.in_shared = 1 << numbers("flags")["LEFT_SHARED"]

    def is_register_product(self, pc: int) -> bool:
        return self.ops[pc] == "wgmma" and not self.column["flags"][pc] & self.in_shared

    def overwrites(self, product: int) -> list[int]:
        """Every path from a product to its wait is followed, with the number of groups committed since."""
        if not self.is_register_product(product):
            return []
        registers = {int(slot) for slot in self.operands[product][:4]}
        seen: set[tuple[int, int]] = set()
        found: dict[int, None] = {}
        ahead = [(product + 1, 0)]
        while ahead:
            pc, commits = ahead.pop()
            if pc >= len(self.ops) or (pc, commits) in seen:
                continue
            seen.add((pc, commits))
            op = self.ops[pc]
            if op == "wgmma_wait" and commits > self.column["immediate"][pc]:
                continue
            if op == "wgmma_commit":
                commits = min(commits + 1, MOST_GROUPS)
            if registers & self.written(pc):
                found[pc] = None
            if op == "bra":
                ahead.append((int(self.column["target"][pc]), commits))
            if op not in ("bra", "ret") or self.column["guard"][pc] != ABSENT:
                ahead.append((pc + 1, commits))
        return list(found)

    def controls(self, pc: int) -> set[int]:
        """The register slots that say whether, where and how much an instruction accesses."""
        op, operands = self.ops[pc], self.operands[pc]
        places: tuple[int, ...] = ()
        if op.startswith(("ld_", "st_", "ldmatrix", "stmatrix")):
            places = (BASE,)
        elif op.startswith("atom_"):
            places = (1,)
        elif op == "cp_async":
            places = (0, 1, 2)
        return {int(slot) for slot in (self.column["guard"][pc], *operands[list(places)]) if slot != ABSENT}

    def written(self, pc: int) -> set[int]:
        """The register slots that an instruction writes."""
        op, operands = self.ops[pc], self.operands[pc]
        if op == "wgmma":
            start = int(self.column["extra"][pc])
            return {int(slot) for slot in self.kernel.lists[start : start + int(self.column["count"][pc]) // 2]}
        if op.startswith(("st_", "stmatrix", "cp_", "bar", "bra", "ret", "fence", "nop", "trap", "wgmma_")):
            return set()
        if op.startswith(("ld_", "ldmatrix", "unpack")):
            results = int(self.column["count"][pc])
        else:
            results = 4 if op.startswith("mma_") else 2 if op.startswith(("setp", "shfl")) else 1
        return {int(slot) for slot in operands[:results] if slot != ABSENT}

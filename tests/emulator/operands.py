"""PTX operands → numbers of register slots.

A slot is 32 lanes of 32 bits; a 64-bit register takes two. Registers, constants, kernel parameters and special
registers all get one, so that the machine never asks what kind of operand it has.
"""

from __future__ import annotations

import re
import struct

from emulator.build import numbers

WIDTH = {
    "pred": 4, "b8": 1, "s8": 1, "u8": 1, "b16": 2, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "b32": 4, "s32": 4,
    "u32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
CONSTANT, PARAMETER, SPECIAL = range(3)  # what a register holds when a kernel starts: PresetKind in machine.hpp
ABSENT = -1


class Unsupported(Exception):
    """PTX that the machine does not know. It is refused, never guessed at."""


class Slots:
    """The slots of one kernel, by what they hold. Registers are looked up in the scopes that braces open and close."""

    def __init__(self, symbols: dict[str, int]) -> None:
        self.symbols = symbols  # of shared memory: their addresses
        self.count = 0
        self.presets: list[tuple[int, int, int, int]] = []  # slot, kind, width, value
        self._scopes: list[dict[str, tuple[str, int]]] = [{}]
        self._declarations = 0
        self._slots: dict[object, int] = {}

    def open_scope(self) -> None:
        self._scopes.append({})

    def close_scope(self) -> None:
        self._scopes.pop()

    def declare(self, kind: str, registers: str) -> None:
        """`registers` as in `.reg .b32 %r<9>, %x;`."""
        for declared in registers.split(","):
            stem, _, count = declared.strip().partition("<")
            self._declarations += 1
            for name in [f"{stem}{i}" for i in range(int(count.rstrip(">")))] if count else [stem]:
                self._scopes[-1][name] = (kind, self._declarations)

    def is_wide(self, operand: str) -> bool:
        """Whether it is a register of 64 bits."""
        known = self._known(operand)
        return known is not None and WIDTH[known[0]] == 8

    def of(self, operand: str, width: int) -> int:
        """The slot of an operand of `width` bytes; raises Unsupported where 64 bits meet fewer."""
        if operand == "_":
            return ABSENT
        known = self._known(operand)
        if known is not None:
            if (WIDTH[known[0]] == 8) != (width == 8):
                raise Unsupported(f"{operand} is .{known[0]}, and {width} bytes are asked for")
            return self._slot((operand, known[1]), width)
        if operand in self.symbols:
            return self.preset(CONSTANT, width, self.symbols[operand])
        if operand[0] == "%":
            return self.preset(SPECIAL, 4, numbers("specials")[operand[1:]])
        return self.preset(CONSTANT, width, constant(operand, width))

    def all(self, operands: str, width: int) -> list[int]:
        """The slots of a vector operand: `{a, b, …}`, or of a single one."""
        return [self.of(operand, width) for operand in vector(operands)]

    def preset(self, kind: int, width: int, value: int) -> int:
        """The slot of what a kernel starts with."""
        key = (kind, width, value)
        if key not in self._slots:
            self.presets.append((self._slot(key, width), kind, width, value if value < 2**63 else value - 2**64))
        return self._slots[key]

    def address(self, operand: str, width: int) -> tuple[int, int]:
        """Slot of the base (ABSENT for a bare address) and offset of `[base + offset]`."""
        base, _, offset = operand.strip()[1:-1].replace(" ", "").partition("+")
        if re.fullmatch(r"-?\d+", base):
            return ABSENT, int(base)
        return self.of(base, width), int(offset, 0) if offset else 0

    def _known(self, name: str) -> tuple[str, int] | None:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _slot(self, key: object, width: int) -> int:
        if key not in self._slots:
            self._slots[key] = self.count
            self.count += 2 if width == 8 else 1
        return self._slots[key]


def split(text: str) -> list[str]:
    """Operands at the commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*found, last] if last else found


def vector(operand: str) -> list[str]:
    """The parts of `{a, b, …}`; anything else is one part."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


def constant(text: str, width: int) -> int:
    """A literal's bits."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?\d+\.\d+(e[+-]?\d+)?", text):
        return int(struct.unpack("<I", struct.pack("<f", float(text)))[0])
    return int(text.rstrip("U"), 0) & (1 << 8 * width) - 1

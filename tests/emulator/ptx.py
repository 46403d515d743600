"""PTX text → a kernel as a table of numbers, which the machine executes.

Statements, labels and scopes are read here; what an instruction means is in decode.py and decode_memory.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from emulator.decode import DECODERS, Instruction, Tables
from emulator.decode_memory import MEMORY_DECODERS
from emulator.operands import Slots, Unsupported

ENTRY = re.compile(r"\.visible\s+\.entry\s+(\S+?)\s*\((.*?)\)(.*?)\{", re.DOTALL)
LOCATION = re.compile(r"//\s*(\S+\.py):(\d+)")
MEANINGS = DECODERS | MEMORY_DECODERS
INLINED = re.compile(r"@\[ (\S+?\.py):(\d+)")


@dataclass(eq=False)
class Kernel:
    """What the machine runs. Of every instruction `places` says which Python line it came from, `text` its PTX.

    A granule is the size in bytes of the smallest access: shadows have a cell for each.
    """

    name: str
    code: np.ndarray  # [instructions, fields], int64
    lists: np.ndarray
    presets: np.ndarray  # [·, 4]
    slots: int
    threads: int
    parameters: list[str]  # their PTX types
    shared_granule: int
    global_granule: int
    places: list[str]
    text: list[str]


@lru_cache(maxsize=4096)
def parse(ptx: str) -> Kernel:
    """The kernel of a PTX module that has one. Raises Unsupported for whatever the machine does not know."""
    entry = ENTRY.search(ptx)
    if entry is None:
        raise Unsupported("no .entry in the PTX")
    name, parameters, attributes = entry.groups()
    types = re.findall(r"\.param\s+\.(\w+)", parameters)
    parameter_names = re.findall(r"(\w+)\s*(?:,|$)", re.sub(r"//.*", "", parameters).strip())
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", attributes)
    if threads is None:
        raise Unsupported("the number of threads is not in the PTX")
    shared = re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)", ptx[: entry.start()])
    tables = Tables(Slots(dict.fromkeys(shared, 0)), dict(zip(parameter_names, types, strict=True)))
    places = _Body(tables).read(ptx[entry.end() :])
    for instruction, label in tables.jumps:
        instruction.target = tables.labels[label]
    return Kernel(
        name, np.array([i.row() for i in tables.instructions], dtype=np.int64),
        np.array([*tables.lists, 0], dtype=np.int64), np.array(tables.slots.presets, dtype=np.int64).reshape(-1, 4),
        tables.slots.count, int(threads.group(1)), types, min(tables.shared_sizes), min(tables.global_sizes),
        places, [i.text for i in tables.instructions],
    )  # fmt: skip


class _Body:
    """Statements between the braces of a kernel, one after the other."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.place = ""
        self.places: list[str] = []
        self.depth = 1

    def read(self, body: str) -> list[str]:
        pending = ""
        for line in body.splitlines():
            text = line.partition("//")[0].strip()
            if text.startswith(".loc"):
                self._locate(line)
            elif not text.startswith((".file", ".section", ".pragma")):
                for piece in re.findall(r"[^;]*;|[^;]+$", text):
                    pending = self._consume(f"{pending} {piece.strip()}".strip())
                    if self.depth == 0:
                        return self.places
        return self.places

    def _locate(self, line: str) -> None:
        found = LOCATION.search(line)
        if found:
            self.place = " < ".join(f"{file}:{number}" for file, number in [found.groups(), *INLINED.findall(line)])

    def _consume(self, text: str) -> str:
        """Labels, braces and complete statements are taken from the front; what is left waits for the next line."""
        while text and self.depth:
            label = re.match(r"([$\w]+):", text)
            if label:
                self.tables.labels[label.group(1)] = len(self.tables.instructions)
                text = text[label.end() :].strip()
            elif text[0] == "{":
                self.tables.slots.open_scope()
                self.depth += 1
                text = text[1:].strip()
            elif text[0] == "}":
                self.tables.slots.close_scope()
                self.depth -= 1
                text = text[1:].strip()
            elif text.endswith(";"):
                self._statement(text[:-1].strip())
                return ""
            else:
                return text
        return text

    def _statement(self, text: str) -> None:
        registers = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if registers:
            self.tables.slots.declare(*registers.groups())
        elif text:
            instruction = Instruction(text, self.tables)
            self.tables.instructions.append(instruction)
            self.places.append(self.place)
            try:
                MEANINGS[instruction.parts[0]](instruction)
            except (Unsupported, KeyError, ValueError, IndexError, TypeError) as error:
                raise Unsupported(f"{text!r}: {type(error).__name__} {error}") from error

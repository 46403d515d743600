"""What an instruction means: its operation, its flags and the slots of its operands. Arithmetic, moves, control."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from emulator import build
from emulator.operands import ABSENT, WIDTH, Slots, Unsupported, constant, split, vector

FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
MODIFIERS = {"ftz": "FTZ", "NaN": "NAN_WINS", "sat": "SATURATE", "relu": "RELU"}
JOINED = ("and", "or", "xor")


@dataclass
class Tables:
    """What the instructions of one kernel share."""

    slots: Slots
    parameters: dict[str, str]
    instructions: list[Instruction] = field(default_factory=list)
    lists: list[int] = field(default_factory=list)  # registers of instructions with more operands than a row has
    labels: dict[str, int] = field(default_factory=dict)
    jumps: list[tuple[Instruction, str]] = field(default_factory=list)
    shared_sizes: set[int] = field(default_factory=lambda: {16})
    global_sizes: set[int] = field(default_factory=lambda: {16})


class Instruction:
    """One instruction: the words of its name in `parts`, its operands as text, and what the machine gets to know."""

    def __init__(self, text: str, tables: Tables) -> None:
        self.text, self.tables = text, tables
        self.slots = [ABSENT] * 16
        self.op = self.negated = self.count = self.size = self.flags = self.how = self.extra = 0
        self.immediate = self.target = 0
        self.guard = ABSENT
        guard = re.match(r"@(!?)([%\w$]+)\s+", text)
        if guard:
            self.negated = int(bool(guard.group(1)))
            self.guard = self.slot(guard.group(2), 4)
            text = text[guard.end() :]
        name, *rest = text.split(None, 1)
        self.parts = name.split(".")
        self.operands = split(rest[0]) if rest else []
        self.type = self.parts[-1]
        self.width = WIDTH.get(self.type, 4)
        self.belongs_to("alu")
        for word in self.parts:
            if word in MODIFIERS:
                self.flag(MODIFIERS[word])

    @property
    def is_float(self) -> bool:
        return self.type in FLOATS

    @property
    def unsigned(self) -> str:
        """The type where the sign does not matter."""
        return f"u{8 * self.width}"

    @property
    def signed(self) -> str:
        """The type where it does."""
        return self.type if self.type[0] == "s" else self.unsigned

    def row(self) -> list[int]:
        return [*(getattr(self, name) for name in build.names("fields")), *self.slots]

    def belongs_to(self, kind: str) -> None:
        self.kind = build.numbers("kinds")[kind]

    def flag(self, name: str) -> None:
        self.flags |= 1 << build.numbers("flags")[name]

    def slot(self, operand: str, width: int) -> int:
        return self.tables.slots.of(operand, width)

    def which(self, *words: str) -> int:
        """The place in `words` of the only one that the instruction's name has."""
        (found,) = (words.index(part) for part in self.parts[1:] if part in words)
        return found

    def use(self, op: str, *slots: int) -> None:
        self.op = build.numbers("ops")[op]
        self.slots[: len(slots)] = slots

    def plain(self, op: str, *widths: int) -> None:
        """Every operand is a register or a constant, of these bytes."""
        self.use(op, *(self.slot(o, w) for o, w in zip(self.operands, widths, strict=True)))

    def refuse(self) -> None:
        raise Unsupported(self.text)


def type_number(name: str) -> int:
    """Of the machine's list; untyped bits count as unsigned."""
    return build.numbers("types")[(f"u{name[1:]}" if re.fullmatch(r"b\d+", name) else name).upper()]


def arithmetic(i: Instruction) -> None:
    """add, sub, min, max, div, rem, neg, abs, and the functions that only floating point has."""
    root = i.parts[0]
    whole = i.signed if root in ("min", "max", "div", "rem", "abs") else i.unsigned
    i.plain(f"{root}_{i.type if i.is_float else whole}", *[i.width] * len(i.operands))


def multiply(i: Instruction) -> None:
    """mul, mad, fma."""
    root = i.parts[0]
    arity = 3 if root == "mul" else 4
    if i.is_float:
        i.plain(f"{'mul' if root == 'mul' else 'fma'}_{i.type}", *[i.width] * arity)
    elif "wide" in i.parts:
        i.plain(f"{root}wide_{i.type}", *[2 * i.width, i.width, i.width, 2 * i.width][:arity])
    elif "hi" in i.parts:
        i.plain(f"{root}hi_{i.signed}", *[i.width] * arity)
    else:
        i.plain(f"{root}_{i.unsigned}", *[i.width] * arity)


def logic(i: Instruction) -> None:
    kind = "pred" if i.type == "pred" else i.unsigned
    i.plain(f"{i.parts[0]}_{kind}", *[i.width] * len(i.operands))


def shift(i: Instruction) -> None:
    root = i.parts[0]
    i.plain(f"{root}_{i.signed if root == 'shr' else i.unsigned}", i.width, i.width, 4)


def bits(i: Instruction) -> None:
    """bfe, bfi, popc, clz, brev, prmt."""
    root = i.parts[0]
    if root == "bfe":
        i.plain(f"bfe_{i.type}", i.width, i.width, 4, 4)
    elif root == "prmt":
        i.plain({"b32": "prmt"}[i.type], 4, 4, 4, 4)
    else:
        i.plain(f"{root}_{i.type}", *[4] * len(i.operands))


def lookup(i: Instruction) -> None:
    i.immediate = constant(i.operands.pop(), 4)
    i.plain("lop3", 4, 4, 4, 4)


def funnel_shift(i: Instruction) -> None:
    i.how = i.which("clamp", "wrap")
    i.plain(("shf_l", "shf_r")[i.which("l", "r")], 4, 4, 4, 4)


def move(i: Instruction) -> None:
    into, source = i.operands
    parts = vector(into if into.startswith("{") else source)
    i.count, i.size = len(parts), i.width // len(parts)
    if into.startswith("{"):
        i.use("unpack", *(i.slot(p, 4) for p in parts), i.slot(source, i.width))
    elif source.startswith("{"):
        i.use("pack", i.slot(into, i.width), *(i.slot(p, i.size) for p in parts))
    elif i.type == "pred":
        i.plain("mov_pred", 4, 4)
    else:
        i.plain(f"mov_b{8 * max(2, i.width)}", i.width, i.width)


def convert_address(i: Instruction) -> None:
    """cvta: every address space begins at 0 here."""
    i.plain(f"mov_b{8 * i.width}", i.width, i.width)


def select(i: Instruction) -> None:
    i.plain(f"selp_b{8 * i.width}", i.width, i.width, i.width, 4)


def set_predicate(i: Instruction) -> None:
    how, is_number = i.parts[1], i.is_float
    if not is_number and i.type[0] in "ub":
        how = UNSIGNED_COMPARISONS.get(how, how)
    i.how = build.numbers("comparisons")[how]
    yes, _, no = i.operands[0].partition("|")
    slots = [i.slot(yes, 4), i.slot(no, 4) if no else ABSENT, *(i.slot(o, i.width) for o in i.operands[1:3])]
    if any(word in JOINED for word in i.parts[2:]):
        i.extra = i.which(*JOINED) + 1
        i.immediate = int(i.operands[3].startswith("!"))
        slots.append(i.slot(i.operands[3].lstrip("!"), 4))
    i.use(f"setp_{i.type if is_number else i.signed}", *slots)


def convert(i: Instruction) -> None:
    to, from_ = i.parts[-2:]
    rounding = [word for word in i.parts if re.fullmatch(r"r[nzmp]i?", word)]
    if to in ("f16x2", "bf16x2"):
        if rounding != ["rn"]:
            i.refuse()
        i.plain(f"cvt_{to}", 4, 4, 4)
    elif to == "tf32":
        if "rna" not in i.parts:
            i.refuse()
        i.plain("cvt_tf32", 4, 4)
    else:
        towards = rounding[0][1] if rounding else "n"
        i.how, i.extra = type_number(from_), type_number(to)
        i.immediate = "nzmp".index(towards)
        i.count = int(bool(rounding) and rounding[0].endswith("i"))
        if not i.count and (towards in "mp" or (towards == "z" and to in ("f16", "bf16"))):
            i.refuse()
        source = WIDTH[from_]
        if source < 8 and i.tables.slots.is_wide(i.operands[1]):  # the lower bits of a wider register
            i.flag("WIDE")
            source = 8
        i.plain("cvt", WIDTH[to], source)


def shuffle(i: Instruction) -> None:
    i.how = i.which("up", "down", "bfly", "idx")
    i.belongs_to("sync")
    into, _, inside = i.operands[0].partition("|")
    i.use("shfl", i.slot(into, 4), i.slot(inside, 4) if inside else ABSENT, *(i.slot(o, 4) for o in i.operands[1:4]))


def vote(i: Instruction) -> None:
    i.how = i.which("ballot", "all", "any", "uni")
    i.immediate = int(i.operands[1].startswith("!"))
    i.use("vote", i.slot(i.operands[0], 4), i.slot(i.operands[1].lstrip("!"), 4))


def reduce(i: Instruction) -> None:
    i.how, i.extra = i.which("add", "min", "max", "and", "or", "xor"), type_number(i.type)
    i.use("redux", i.slot(i.operands[0], 4), i.slot(i.operands[1], 4))


def active_mask(i: Instruction) -> None:
    i.use("activemask", i.slot(i.operands[0], 4))


def barrier(i: Instruction) -> None:
    i.belongs_to("sync")
    if "warp" in i.parts:
        i.use("bar_warp")
    elif "sync" in i.parts and i.operands == ["0"]:
        i.use("bar_sync")
    else:  # named barriers, those of some threads
        i.refuse()


def fence(i: Instruction) -> None:
    i.belongs_to("sync")
    i.use("fence_async" if i.parts[1:3] == ["proxy", "async"] else "fence")


def branch(i: Instruction) -> None:
    i.belongs_to("branch")
    i.tables.jumps.append((i, i.operands[0]))
    i.use("bra")


def end(i: Instruction) -> None:
    i.belongs_to("branch")
    i.use("trap" if i.parts[0] == "trap" else "ret")


def nothing(i: Instruction) -> None:
    i.use("nop")


def _registered(*groups: tuple[str, Callable[[Instruction], None]]) -> dict[str, Callable[[Instruction], None]]:
    return {root: decoder for roots, decoder in groups for root in roots.split()}


DECODERS = _registered(
    ("add sub min max div rem neg abs sqrt rsqrt rcp ex2 lg2 sin cos tanh", arithmetic),
    ("mul mad fma", multiply),
    ("and or xor not", logic),
    ("shl shr", shift),
    ("bfe bfi popc clz brev prmt", bits),
    ("lop3", lookup),
    ("shf", funnel_shift),
    ("mov", move),
    ("cvta", convert_address),
    ("selp", select),
    ("setp", set_predicate),
    ("cvt", convert),
    ("shfl", shuffle),
    ("vote", vote),
    ("redux", reduce),
    ("activemask", active_mask),
    ("bar barrier", barrier),
    ("membar fence", fence),
    ("bra", branch),
    ("ret exit trap", end),
    ("prefetch discard applypriority createpolicy griddepcontrol nanosleep", nothing),
)

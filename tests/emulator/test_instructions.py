"""Single instructions in 32 lanes, against Python's and numpy's arithmetic."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from emulator import machine
from emulator.operands import Unsupported
from emulator.ptx import parse

HEADER = """.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({parameters})
.reqntid 32
{{
.reg .pred %p<9>;
.reg .b16 %h<9>;
.reg .b32 %r<40>;
.reg .b64 %rd<40>;
mov.u32 %r20, %tid.x;
"""
ADDRESS = "ld.param.b64 %rd20, [k_param_{i}];\nmad.wide.u32 %rd21, %r20, {size}, %rd20;\n"


def execute(body: str, inputs: list[np.ndarray], shared: int = 0) -> np.ndarray:
    """What %r0 holds in 32 lanes after `body`, with %r1, %r2, … loaded from the inputs, which are 32-bit words."""
    text = HEADER.format(parameters=", ".join(f".param .u64 k_param_{i}" for i in range(len(inputs) + 1)))
    for i in range(len(inputs)):
        text += ADDRESS.format(i=i, size=4) + f"ld.global.b32 %r{i + 1}, [%rd21];\n"
    text += f"{body}\n{ADDRESS.format(i=len(inputs), size=4)}st.global.b32 [%rd21], %r0;\nret;\n}}\n"
    result = np.zeros(32, dtype=np.uint32)
    arrays = [*inputs, result]
    done = machine.launch(
        parse(text), (1,), [a.ctypes.data for a in arrays], [(a.ctypes.data, a.nbytes) for a in arrays], shared
    )
    assert not done.errors, done.errors[0]
    return result


RNG = np.random.default_rng(3)
EDGES = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x3F800000, 0x7FC00000, 0xBF800000]


def words() -> list[np.ndarray]:
    found = RNG.integers(0, 2**32, size=(3, 32), dtype=np.uint32)
    for row in found:
        row[: len(EDGES)] = RNG.permutation(EDGES)
    return list(found)


def signed(x: int, bits: int = 32) -> int:
    x &= 2**bits - 1
    return x - 2**bits if x >> bits - 1 else x


def towards_zero(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def bit_field(a: int, at: int, length: int, keeps_sign: bool) -> int:
    at, length = at & 255, length & 255
    if length == 0:
        return 0
    value = signed(a) if keeps_sign else a
    sign = value >> min(at + length - 1, 31) & 1 if keeps_sign else 0
    return sum((value >> at + i & 1 if i < length and at + i < 32 else sign) << i for i in range(32))


def inserted(a: int, b: int, at: int, length: int) -> int:
    at, length = at & 255, length & 255
    mask = ((1 << length) - 1) << at & 0xFFFFFFFF
    return b & ~mask | a << at & mask


def byte_permute(a: int, b: int, selector: int) -> int:
    data = struct.pack("<II", a, b)
    picks = [selector >> 4 * i & 15 for i in range(4)]
    return int.from_bytes([255 * (data[p & 7] >> 7) if p & 8 else data[p & 7] for p in picks], "little")


INTEGERS: dict[str, Callable[[int, int, int], int]] = {
    "add.s32 %r0, %r1, %r2;": lambda a, b, c: a + b,
    "sub.s32 %r0, %r1, %r2;": lambda a, b, c: a - b,
    "mul.lo.s32 %r0, %r1, %r2;": lambda a, b, c: a * b,
    "mul.hi.u32 %r0, %r1, %r2;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r0, %r1, %r2;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r0, %r1, %r2, %r3;": lambda a, b, c: a * b + c,
    "div.s32 %r0, %r1, 7;": lambda a, b, c: towards_zero(signed(a), 7),
    "rem.s32 %r0, %r1, -7;": lambda a, b, c: signed(a) + 7 * towards_zero(signed(a), -7),
    "rem.u32 %r0, %r1, 7;": lambda a, b, c: a % 7,
    "min.s32 %r0, %r1, %r2;": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %r0, %r1, %r2;": lambda a, b, c: max(a, b),
    "shl.b32 %r0, %r1, %r2;": lambda a, b, c: a << min(b, 32),
    "shr.u32 %r0, %r1, %r2;": lambda a, b, c: a >> min(b, 32),
    "shr.s32 %r0, %r1, %r2;": lambda a, b, c: signed(a) >> min(b, 32),
    "shf.l.wrap.b32 %r0, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.clamp.b32 %r0, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 %r0, %r1, %r2, %r3;": lambda a, b, c: bit_field(a, b, c, False),
    "bfe.s32 %r0, %r1, 3, 5;": lambda a, b, c: bit_field(a, 3, 5, True),
    "bfe.s32 %r0, %r1, %r2, %r3;": lambda a, b, c: bit_field(a, b, c, True),
    "bfi.b32 %r0, %r1, %r2, 5, 9;": lambda a, b, c: inserted(a, b, 5, 9),
    "bfi.b32 %r0, %r1, %r2, %r3, 12;": lambda a, b, c: inserted(a, b, c, 12),
    "prmt.b32 %r0, %r1, %r2, %r3;": byte_permute,
    "prmt.b32 %r0, %r1, %r2, 0x5410U;": lambda a, b, c: b << 16 | a & 0xFFFF,
    "lop3.b32 %r0, %r1, %r2, %r3, 0xca;": lambda a, b, c: (a & b) | (~a & c),
    "neg.s32 %r0, %r1;": lambda a, b, c: -a,
    "not.b32 %r0, %r1;": lambda a, b, c: ~a,
    "abs.s32 %r0, %r1;": lambda a, b, c: abs(signed(a)),
    "popc.b32 %r0, %r1;": lambda a, b, c: a.bit_count(),
    "clz.b32 %r0, %r1;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %r0, %r1;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "{.reg .pred p; setp.lt.s32 p, %r1, %r2; selp.b32 %r0, %r3, 5, p;}":
        lambda a, b, c: c if signed(a) < signed(b) else 5,
    "setp.lo.u32 %p1, %r1, 100;\nsetp.ge.and.s32 %p2|%p3, %r2, 0, !%p1;\nselp.b32 %r0, 1, 0, %p2;\n"
    "selp.b32 %r4, 2, 0, %p3;\nor.b32 %r0, %r0, %r4;":
        lambda a, b, c: (1 if signed(b) >= 0 else 2) if a >= 100 else 0,
    "mov.b32 {%h1, %h2}, %r1;\nadd.s16 %h3, %h1, %h2;\nmov.b32 %r0, {%h3, %h1};":
        lambda a, b, c: (a & 0xFFFF) << 16 | (a + (a >> 16)) & 0xFFFF,
    "mul.wide.s32 %rd5, %r1, %r2;\nshr.s64 %rd6, %rd5, 17;\ncvt.u32.u64 %r0, %rd6;":
        lambda a, b, c: signed(a) * signed(b) >> 17,
    "mov.b64 %rd5, {%r1, %r2};\nmov.b64 {%r4, %r0}, %rd5;": lambda a, b, c: b,
    "mov.b64 %rd5, {%r1, %r2};\ncvt.s64.s32 %rd6, %rd5;\nshr.s64 %rd6, %rd6, 16;\ncvt.u32.u64 %r0, %rd6;":
        lambda a, b, c: signed(a) >> 16,
    "mov.b32 {_, %h2}, %r1;\ncvt.s32.s16 %r0, %h2;": lambda a, b, c: signed(a >> 16, 16),
    "cvt.u16.u32 %h1, %r1;\ncvt.u32.u16 %r0, %h1;": lambda a, b, c: a & 0xFFFF,
}  # fmt: skip


@pytest.mark.parametrize("body", INTEGERS)
def test_integers(body: str) -> None:
    inputs = words()
    got = execute(body, inputs)
    for lane in range(32):
        a, b, c = (int(x[lane]) for x in inputs)
        assert got[lane] == INTEGERS[body](a, b, c) & 0xFFFFFFFF, (lane, hex(a), hex(b), hex(c))


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.copy()).bfloat16().float().numpy()


def as_float16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def as_int32(x: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.clip(np.trunc(x), -(2.0**31), 2.0**31), posinf=2.0**31, neginf=-(2.0**31))


VALUES = np.array(
    [0.0, -0.0, 1.5, -2.25, np.inf, -np.inf, np.nan, 1e-40, -1e-41, 65504, 65519.9, 65520, 1e38, 3e-8, 6e-8, 1 / 3] * 2,
    dtype=np.float32,
)
FLOATS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "fma.rn.f32 %r0, %r1, %r2, %r3;": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "add.f32 %r0, %r1, %r2;": lambda a, b, c: a + b,
    "min.f32 %r0, %r1, %r2;": lambda a, b, c: np.fmin(a, b),
    "max.NaN.f32 %r0, %r1, %r2;": lambda a, b, c: np.maximum(a, b),
    "add.ftz.f32 %r0, %r1, 0f00000000;": lambda a, b, c: np.where(np.abs(a) < 1.1754944e-38, 0, a),
    "div.full.f32 %r0, %r1, %r2;": lambda a, b, c: a / b,
    "neg.f32 %r0, %r1;": lambda a, b, c: -a,
    "sqrt.approx.f32 %r0, %r1;": lambda a, b, c: np.sqrt(a),
    "cvt.rn.f16.f32 %h1, %r1;\ncvt.f32.f16 %r0, %h1;": lambda a, b, c: as_float16(a),
    "cvt.rn.bf16.f32 %h1, %r1;\ncvt.f32.bf16 %r0, %h1;": lambda a, b, c: as_bfloat16(a),
    "cvt.rn.f16x2.f32 %r4, %r1, %r2;\nmov.b32 {%h1, %h2}, %r4;\ncvt.f32.f16 %r0, %h2;": lambda a, b, c: as_float16(a),
    "cvt.rn.bf16x2.f32 %r4, %r1, %r2;\nmov.b32 {%h1, %h2}, %r4;\ncvt.f32.bf16 %r0, %h1;":
        lambda a, b, c: as_bfloat16(b),
    "cvt.rzi.s32.f32 %r4, %r1;\ncvt.rn.f32.s32 %r0, %r4;": lambda a, b, c: as_int32(a),
    "setp.geu.f32 %p1, %r1, %r2;\nselp.f32 %r0, 0f3f800000, 0f00000000, %p1;": lambda a, b, c: ~(a < b),
    "setp.gt.f32 %p1, %r1, %r2;\nselp.f32 %r0, 0f3f800000, 0f00000000, %p1;": lambda a, b, c: a > b,
}  # fmt: skip


@pytest.mark.parametrize("body", FLOATS)
def test_floats(body: str) -> None:
    a, b, c = VALUES, RNG.permutation(VALUES), RNG.permutation(VALUES)
    got = execute(body, [x.view(np.uint32) for x in (a, b, c)]).view(np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, FLOATS[body](a, b, c).astype(np.float32))


def test_every_float16() -> None:
    """All bit patterns widen as numpy widens them, and come back; what lies between two rounds to even."""
    body = "cvt.u16.u32 %h1, %r1;\ncvt.f32.f16 %r0, %h1;"
    back = "cvt.rn.f16.f32 %h1, %r1;\ncvt.u32.u16 %r0, %h1;"
    patterns = np.arange(2**16, dtype=np.uint32)
    with np.errstate(all="ignore"):
        expected = patterns.astype(np.uint16).view(np.float16).astype(np.float32)
        between = (expected + np.roll(expected, 1)) / 2
    for start in range(0, 2**16, 32 * 61):
        some = slice(start, start + 32)
        got = execute(body, [patterns[some]]).view(np.float32)
        np.testing.assert_array_equal(got, expected[some])
        for values in (expected[some], between[some]):
            bits = execute(back, [values.view(np.uint32)]).astype(np.uint16).view(np.float16)
            with np.errstate(all="ignore"):
                np.testing.assert_array_equal(bits, values.astype(np.float16))


def test_tf32_rounds_to_nearest() -> None:
    got = execute("cvt.rna.tf32.f32 %r0, %r1;", [VALUES.view(np.uint32)]).view(np.float32)
    got, values = got[np.isfinite(VALUES)], VALUES[np.isfinite(VALUES)]
    assert (np.abs(got - values) <= np.abs(values) * 2**-11 + 1e-38).all()
    assert not (got.view(np.uint32) & 0x1FFF).any()


def test_lanes_part_and_meet_again() -> None:
    """Every lane turns a loop as often as its own number says; behind it all shuffle together."""
    body = """
    mov.u32 %r4, 0; mov.u32 %r5, 0;
    $LOOP:
    setp.ge.u32 %p1, %r5, %r20;
    @%p1 bra $DONE;
    add.s32 %r4, %r4, %r5;
    add.s32 %r5, %r5, 1;
    bra.uni $LOOP;
    $DONE:
    shfl.sync.bfly.b32 %r0, %r4, 1, 31, -1;
    """
    got = execute(body, words())
    assert [int(x) for x in got] == [(n ^ 1) * ((n ^ 1) - 1) // 2 for n in range(32)]


def test_votes_and_reductions() -> None:
    inputs = [np.arange(32, dtype=np.uint32)]
    assert (execute("setp.lt.u32 %p1, %r1, 5;\nvote.sync.ballot.b32 %r0, %p1, -1;", inputs) == 31).all()
    assert (execute("redux.sync.add.s32 %r0, %r1, -1;", inputs) == 496).all()


def test_parameter_extended_to_64_bits() -> None:
    text = (
        ".visible .entry k(.param .u32 k_param_0, .param .u64 k_param_1)\n.reqntid 32\n{\n.reg .b64 %rd<9>;\n"
        "ld.param.s32 %rd1, [k_param_0];\nld.param.b64 %rd2, [k_param_1];\nst.global.b64 [%rd2], %rd1;\nret;\n}\n"
    )
    out = np.zeros(1, dtype=np.int64)
    done = machine.launch(parse(text), (1,), [-5 & 0xFFFFFFFF, out.ctypes.data], [(out.ctypes.data, 8)], 0)
    assert out[0] == -5 and not done.errors


def test_shared_memory_that_nobody_wrote_is_nan() -> None:
    body = "mov.b32 %r5, global_smem;\nmad.lo.u32 %r5, %r20, 4, %r5;\nld.shared.b32 %r0, [%r5];"
    assert np.isnan(execute(body, words(), shared=128).view(np.float32)).all()


@pytest.mark.parametrize(
    "body",
    [
        "frobnicate.b32 %r0, %r1;",
        "add.s32 %r0, %r1, %rd1;",
        "cvt.rz.f16.f32 %h1, %r1;",
        "bar.sync 1, 64;",
        "ld.b32 %r0, [%rd20];",
        "cp.async.bulk.shared.global [%r1], [%rd20], 16, [%r2];",
    ],
)
def test_unknown_instructions_are_refused(body: str) -> None:
    with pytest.raises(Unsupported):
        execute(body, words())


def test_barrier_that_not_all_lanes_reach() -> None:
    body = "setp.lt.u32 %p1, %r20, 5;\n@%p1 bra $A;\nbar.sync 0;\n$A:\nmov.u32 %r0, 1;\nbar.sync 0;"
    with pytest.raises(AssertionError, match=r"diverged|deadlock"):
        execute(body, words())

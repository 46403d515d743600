"""What can be read from AMD assembly: other waves' stores are there before a release, and lanes of a sum agree."""

from __future__ import annotations

import re

import pytest
from test_ahead import without_interpreter

pytest.importorskip("triton", reason="Triton is for Linux only")

# One kernel of each kind that takes sums over all pixels, as Triton's JIT specialises it.
PROGRAM = """
import torch
import seqconv_triton as sct
from seqconv_triton.tools.ahead import TARGETS, build, launches

found = {}
for model in ("cifar_seqresnet_r4_k8", "seqresnet_b42"):
    for item in launches(sct.create_model(model, device="meta"), 32, 32, torch.bfloat16, "gfx942"):
        if any(name == "counter_ptr" and kind != "constexpr" for name, kind in item.signature):
            found.setdefault(item.name, item)
for name, item in found.items():
    print("=====", name, len(item.small), build(item, TARGETS["gfx942"]).asm["amdgcn"], sep="\\n")
"""
SHUFFLE = re.compile(r"(?:ds_bpermute_b32|ds_swizzle_b32|v_mov_b32_dpp|v_permlane\w+) (v\d+), (?:v\d+, )?(v\d+)")
FMA = re.compile(r"v_fmac?_f32(?:_e\d+)? (v\d+), (v\d+), (v\d+)(?:, (v\d+))?")
PAIRED = re.compile(r"v_pk_(mul|fma)_f32 ([^ ,]+(?:, [^ ,]+)+)")
REGISTERS = re.compile(r"([vs])\[(\d+):(\d+)\]")
PRODUCT = re.compile(r"v_mul_f32(?:_e\d+)? (v\d+), (v\d+), (v\d+)")


@pytest.fixture(scope="module")
def kernels() -> dict[str, tuple[int, str]]:
    """By name: how many pointers are known to address less than 2 GiB, and the assembly."""
    parts = (part.split("\n", 2) for part in without_interpreter(PROGRAM).split("=====\n")[1:])
    return {name: (int(small), text) for name, small, text in parts}


def undrained(text: str) -> list[str]:
    """Releases with a store between the last wait for stores and the barrier in front of them."""
    found, drained, at_barrier = [], True, True
    for line in map(str.strip, text.splitlines()):
        if line.startswith(("buffer_store", "global_store")):
            drained = False
        elif re.match(r"s_waitcnt.*vmcnt\(0\)", line):
            drained = True
        elif line.startswith("s_barrier"):
            at_barrier = drained
        elif line.startswith("buffer_wbl2") and not at_barrier:
            found.append(line)
    return found


def scalar(line: str) -> list[str]:
    """An instruction on pairs of registers as two on single ones, any other as it is.

    `op_sel` names the halves that the first one reads, `op_sel_hi` those of the second one; a constant has no halves.
    """
    paired = PAIRED.match(line)
    if paired is None:
        return [line]
    target, *sources = (REGISTERS.fullmatch(operand) or operand for operand in paired[2].split(", "))
    found = []
    for half, option in enumerate(("op_sel", "op_sel_hi")):
        chosen = re.search(rf"\b{option}:\[([\d,]+)\]", line)
        halves = map(int, chosen[1].split(",")) if chosen else [half] * len(sources)
        pairs = [(target, half), *zip(sources, halves, strict=True)]
        names = [text if isinstance(text, str) else f"{text[1]}{int(text[2]) + h}" for text, h in pairs]
        found.append(f"v_{paired[1]}_f32 {', '.join(names)}")
    return found


def written(line: str) -> list[str]:
    """The vector registers that an instruction writes."""
    if "_store" in line or line.startswith("ds_write"):
        return []
    if found := re.match(r"\w+ (v\d+),", line):
        return [found[1]]
    if found := re.match(r"\w+ v\[(\d+):(\d+)\],", line):
        return [f"v{number}" for number in range(int(found[1]), int(found[2]) + 1)]
    return []


def contracted(text: str) -> list[str]:
    """FMAs a·b + s in which s is another lane's a·b, which was rounded: the two lanes' sums differ."""
    shuffled: dict[str, frozenset[str]] = {}
    products: dict[str, frozenset[str]] = {}
    found = []
    for line in (single for whole in text.splitlines() for single in scalar(whole.strip())):
        if fma := FMA.match(line):
            target, a, b, addend = fma.groups()
            if shuffled.get(addend or target) == frozenset((a, b)):
                found.append(line)
        shuffle = SHUFFLE.match(line)
        passed_on = products.get(shuffle[2]) if shuffle else None
        for register in written(line):
            shuffled.pop(register, None)
            products.pop(register, None)
        if product := PRODUCT.match(line):
            products[product[1]] = frozenset(product.groups()[1:])
        if shuffle and passed_on is not None:
            shuffled[shuffle[1]] = passed_on
    return found


def test_a_release_finds_all_stores_done(kernels: dict[str, tuple[int, str]]) -> None:
    """One wave releases the counter for all, and its own wait does not hold for the others' stores."""
    assert set(kernels) == {"convolution", "pull", "transposed", "input_statistics"}
    for name, (_, text) in kernels.items():
        assert text.count("buffer_wbl2") >= 2 and not undrained(text), name


def test_an_acquire_empties_the_cache(kernels: dict[str, tuple[int, str]]) -> None:
    """Behind every counter: `volatile` does not make the last program's loads pass it."""
    for name, (_, text) in kernels.items():
        assert text.count("buffer_inv") == text.count("global_atomic_add"), name


def test_lanes_of_a_sum_agree(kernels: dict[str, tuple[int, str]]) -> None:
    """They write the same word, so the bits of a result must not depend on which is last."""
    for name, (_, text) in kernels.items():
        assert not contracted(text), (name, contracted(text))


def test_small_tensors_are_addressed_as_the_jit_has_them(kernels: dict[str, tuple[int, str]]) -> None:
    for name, (small, text) in kernels.items():
        assert small >= 5 and "buffer_load_dword" in text and "buffer_store_dword" in text, name


def test_the_reader_sees_what_it_is_for() -> None:
    lines = ["v_mul_f32_e32 v3, v1, v2", "v_mov_b32_dpp v4, v3 row_shl:1 row_mask:0xf", "v_fma_f32 v5, v2, v1, v4"]
    assert contracted("\n".join(lines)) == lines[2:]
    assert not contracted("\n".join([lines[0], "v_add_f32_e32 v3, v3, v9", *lines[1:]]))
    assert contracted("\n".join([*lines[:2], "v_add_f32_e32 v3, v3, v9", lines[2]])) == lines[2:]
    assert contracted("\n".join([*lines[:2], "global_store_dwordx2 v[4:5], v[8:9], off", lines[2]])) == lines[2:]
    assert not contracted("\n".join([*lines[:2], "global_load_dwordx2 v[4:5], v[8:9], off", lines[2]]))
    assert scalar("v_pk_mul_f32 v[0:1], v[2:3], 0.5 op_sel_hi:[1,0]") == [
        "v_mul_f32 v0, v2, 0.5",
        "v_mul_f32 v1, v3, 0.5",
    ]
    pairs = ["v_pk_mul_f32 v[2:3], v[10:11], v[20:21] op_sel_hi:[1,0]", lines[1]]
    assert contracted("\n".join([*pairs, "v_fma_f32 v5, v20, v11, v4"]))
    assert not contracted("\n".join([*pairs, "v_fma_f32 v5, v21, v11, v4"]))
    assert contracted(
        "\n".join(
            [
                "v_mul_f32_e32 v3, v1, v2",
                lines[1],
                "v_pk_fma_f32 v[6:7], v[0:1], v[2:3], v[4:5] op_sel:[1,0,0] op_sel_hi:[0,1,1]",
            ]
        )
    )
    release = ["s_barrier", "buffer_wbl2 sc1", "s_waitcnt vmcnt(0)"]
    assert undrained("\n".join(["buffer_store_dword v2, v3", *release])) == ["buffer_wbl2 sc1"]
    assert not undrained("\n".join(["global_store_dword v2, v3", "s_waitcnt vmcnt(0)", *release]))

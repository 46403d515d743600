"""Nothing is wrong with the text of what a network launches on sm_90; `make emulate` reads every candidate's."""

from __future__ import annotations

from typing import Any

import torch

import seqconv_triton as sct
from emulator.driver import ptx_alone
from emulator.ptx import parse
from emulator.reading import read
from seqconv_triton.tools import ahead

TILES = ("KERNEL", "BLOCK_P", "BLOCK_M", "BLOCK_N", "BLOCK_K")


def test_launches_of_a_network() -> None:
    """Of kernels that differ only in what they add or skip, the one that does most."""
    network = sct.create_model("seqresnet_b42", device="meta")
    most: dict[Any, ahead.Launch] = {}
    for item in ahead.launches(network, 224, 32, torch.bfloat16, "sm_90"):
        key = (item.name, *(dict(item.constants).get(tile) for tile in TILES))
        most[key] = max(most.get(key, item), item, key=lambda launch: -len(launch.constants))
    assert len(most) > 10
    with ptx_alone():
        for item in most.values():
            kernel = parse(ahead.build(item, ahead.TARGETS["sm_90"]).asm["ptx"])
            assert not read(kernel), (kernel.name, read(kernel))

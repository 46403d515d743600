"""What the tests of the tuner share: the keys of a model, and a timer whose clock is made up."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import seqconv_triton as sct
from seqconv_triton.kernels import launch
from seqconv_triton.kernels.configs import Key, LaunchConfig
from seqconv_triton.tools.tuning_calls import collect

ARCH = "sm_90"
interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="the interpreter is off where there is a GPU")


@cache
def keys_of(name: str, images: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> set[Key]:
    return {work.key for work in collect(sct.create_model(name, device="meta"), images, dtype, ARCH)}


class Clock:
    """A timer that runs nothing in earnest: it hears what would be launched and says how long that took."""

    def __init__(self, seconds: Callable[[LaunchConfig], float], noise: float = 0.01) -> None:
        self.seconds, self.noise, self.random = seconds, noise, random.Random(0)
        self.heard: list[LaunchConfig] = []

    def __call__(self, run: Callable[[], object]) -> list[float]:
        found: list[LaunchConfig] = []

        def note(_: Any, __: Any, given: dict[str, Any]) -> None:
            sides = given["BLOCK_P"], given.get("BLOCK_M", given["BLOCK_N"])
            inner = given["BLOCK_N"] if "BLOCK_M" in given else given["BLOCK_K"]
            found.append(LaunchConfig(*sides, inner, given["num_warps"], given["num_stages"]))

        with launch.listen(note):
            run()
        self.heard += found
        return [self.seconds(found[0]) * self.random.uniform(1 - self.noise, 1 + self.noise) for _ in range(9)]

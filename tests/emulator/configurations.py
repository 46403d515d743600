"""Every configuration that the heuristic or the tuner can choose, in as few runs as give each a turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from helpers import everything

import seqconv_triton as sct
from emulator.cases import DTYPES, Case
from emulator.check import allowed_on_a_cpu, cast, float32_products
from seqconv_triton.kernels import launch
from seqconv_triton.kernels.candidates import MOST, candidates
from seqconv_triton.kernels.configs import Key, LaunchConfig, assume, hear_keys, use_tables

Choices = dict[Key, LaunchConfig]


def keys_of(case: Case, dtype: str, architecture: str) -> list[Key]:
    """What a case asks configurations for, forward and backward; nothing is compiled for it."""
    return listed(case, dtype, architecture)[0]


@cache
def listed(case: Case, dtype: str, architecture: str) -> tuple[list[Key], set[str]]:
    """The keys of configurations and the names of the kernels of what a case would launch."""
    found: dict[Key, None] = {}
    kernels: set[str] = set()

    def note(kernel: Any, *_: Any) -> None:
        kernels.add(kernel.__name__)

    for training in (True, False):
        module, x = cast(case.build(training), DTYPES[dtype]), case.input(DTYPES[dtype])
        with (
            allowed_on_a_cpu(), float32_products("tf32" if dtype == "tf32" else "ieee"), assume(architecture),
            use_tables(), launch.listen(note), hear_keys() as keys, sct.use_backend("triton"),
        ):  # fmt: skip
            everything(module, x, case.run)
        found |= dict.fromkeys(keys)
    return list(found), kernels


def turns(cases: Iterable[Case], dtype: str, architecture: str) -> Iterator[tuple[Case, Choices]]:
    """Cases with choices, so that every candidate of every key is in use once; the heuristic's own run anyway."""
    done: set[tuple[Key, LaunchConfig]] = set()
    for case in cases:
        if case.tiles is not None:  # what is pinned comes before any table
            continue
        choices = {key: candidates(key, architecture) for key in keys_of(case, dtype, architecture)}
        for number in range(1, MOST):
            table = {key: own[number] for key, own in choices.items() if number < len(own)}
            table = {key: config for key, config in table.items() if (key, config) not in done}
            if table:
                done |= set(table.items())
                yield case, table

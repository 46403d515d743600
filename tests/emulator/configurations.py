"""Every configuration that the heuristic or the tuner can choose, in as few runs as give each a turn."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from helpers import everything
from torch import Tensor

from bench.launched import described
from emulator.cases import DTYPES, Case
from emulator.check import allowed_on_a_cpu, cast, configured, float32_products
from seqconv_triton import kernels
from seqconv_triton.kernels import launch
from seqconv_triton.kernels.candidates import MOST, candidates
from seqconv_triton.kernels.configs import hear_keys
from seqconv_triton.kernels.heuristic import Key, LaunchConfig
from seqconv_triton.tools.ahead import describe

Choices = dict[Key, LaunchConfig]


def written_kernels() -> set[str]:
    """Names of all kernels of the library."""
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@dataclass(frozen=True)
class Listed:
    """What a case would launch, forward and backward: keys of configurations, names of kernels, launches in words."""

    keys: tuple[Key, ...]
    kernels: frozenset[str]
    texts: frozenset[str]


def listed(case: Case, dtype: str, architecture: str, choices: Choices | None = None) -> Listed:
    """What a case would launch, configured by `choices` before the heuristic; nothing is compiled."""
    return _listed(case, dtype, architecture, tuple((choices or {}).items()))


@cache
def _listed(case: Case, dtype: str, architecture: str, choices: tuple[tuple[Key, LaunchConfig], ...]) -> Listed:
    found: dict[Key, None] = {}
    kernels: set[str] = set()
    texts: set[str] = set()

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        kernels.add(kernel.__name__)
        numbers = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        texts.add(f"{grid} {numbers} {described(describe(kernel, arguments))}")

    for training in (True, False):
        module, x = cast(case.build(training), DTYPES[dtype]), case.input(DTYPES[dtype])
        with (
            allowed_on_a_cpu(), float32_products("tf32" if dtype == "tf32" else "ieee"),
            configured(case, architecture, (dict(choices),)), launch.listen(note), hear_keys() as keys,
        ):  # fmt: skip
            everything(module, x, case.run)
        found |= dict.fromkeys(keys)
    return Listed(tuple(found), frozenset(kernels), frozenset(texts))


def turns(cases: Iterable[Case], dtype: str, architecture: str) -> Iterator[tuple[Case, Choices]]:
    """Cases with choices, so that every candidate of every key is in use once; the heuristic's own run anyway."""
    done: set[tuple[Key, LaunchConfig]] = set()
    for case in cases:
        if case.tiles is not None:  # what is pinned comes before any table
            continue
        choices = {key: candidates(key, architecture) for key in listed(case, dtype, architecture).keys}
        for number in range(1, MOST):
            table = {key: own[number] for key, own in choices.items() if number < len(own)}
            table = {key: config for key, config in table.items() if (key, config) not in done}
            if table:
                done |= set(table.items())
                yield case, table

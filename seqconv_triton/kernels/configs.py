"""Launch configurations: a pure function of what a kernel computes, and of tables that were measured before.

What is pinned comes first, then the user's own table for the GPU, then the one that ships for it, then the heuristic.
Nothing is measured here: `python -m seqconv_triton tune` does that (docs/tuning.md).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from seqconv_triton.kernels.heuristic import TWO_STAGES, Key, LaunchConfig, as_fenced, heuristic, is_tile
from seqconv_triton.kernels.tables import Row, read, shipped_file, user_file

WITH_SUMS = ("convolution", "transposed", "pull")  # families whose tiles of pixels leave sums in `launch.Scratch`


Table = Mapping[Key, LaunchConfig]


class Switches(NamedTuple):
    """What a thread (or asyncio task) has switched; `version` is another number inside of every block."""

    pinned: Mapping[str, LaunchConfig]
    tables: tuple[Table, ...] | None
    arch: str
    keys: list[Key] | None
    version: int


NOTHING_SWITCHED = Switches(MappingProxyType({}), None, "sm_90", None, 0)
_switches: ContextVar[Switches] = ContextVar("seqconv_triton_configurations", default=NOTHING_SWITCHED)
_stored: dict[str, Table] = {}  # of an architecture: what was read from its files
_versions = itertools.count(1)
_reading = 0  # the number of the last `reload_tables`


@contextmanager
def _switched(**changes: Any) -> Iterator[None]:
    token = _switches.set(_switches.get()._replace(**changes, version=next(_versions)))
    try:
        yield
    finally:
        _switches.reset(token)


@contextmanager
def pin(kernel: str, block_p: int, block_k: int, num_warps: int = 4, num_stages: int = 2) -> Iterator[None]:
    """Inside, every launch of a kernel family takes these tiles: for tests, and for the same bits on any device.

    As all switches here it holds for this thread alone; a backward pass follows those of its forward pass.
    Output channels keep the tile that the conv groups ask for. Raises ValueError for an unknown family, and for tiles
    that are no powers of two from 16 on.
    """
    if kernel not in TWO_STAGES:
        raise ValueError(f"unknown kernel {kernel!r} (kernels: {', '.join(TWO_STAGES)})")
    for name, size in (("block_p", block_p), ("block_k", block_k)):
        if not is_tile(size):
            raise ValueError(f"{name} ({size}) must be a power of two from 16 on")
    config = LaunchConfig(block_p, 0, block_k, num_warps, num_stages)
    with _switched(pinned={**_switches.get().pinned, kernel: config}):
        yield


@contextmanager
def use_tables(*tables: Table) -> Iterator[None]:
    """Inside, these tables are looked up, the first one first, in place of those stored for the GPU.

    Without any, the heuristic alone decides.
    """
    with _switched(tables=tables):
        yield


def reload_tables() -> None:
    """Read the stored tables again before the next launch, in every thread; otherwise a process reads them once."""
    global _reading
    _stored.clear()
    _reading = next(_versions)


def pinned() -> tuple[int, int]:
    """Numbers that change with what is pinned and with the tables: a key of what was derived from configurations."""
    return _reading, _switches.get().version


@contextmanager
def hear_keys() -> Iterator[list[Key]]:
    """The keys that configurations are asked for inside; nothing derived from them earlier is used."""
    keys: list[Key] = []
    with _switched(keys=keys):
        yield keys


@contextmanager
def assume(arch: str) -> Iterator[None]:
    """Inside, what is on no GPU is configured as for this architecture, so that it can be compiled ahead of time."""
    with _switched(arch=arch):
        yield


def smallest_tile(arch: str) -> int:
    """The fewest pixels that any tile with sums has, whichever configuration is in use."""
    return _smallest_tile(arch, pinned())


@lru_cache(maxsize=64)
def _smallest_tile(arch: str, pins: object) -> int:
    stored = (config.block_p for table in _tables(arch) for key, config in table.items() if key.kernel in WITH_SUMS)
    pinned = (config.block_p for kernel, config in _switches.get().pinned.items() if kernel in WITH_SUMS)
    return min([64, *stored, *pinned])  # the heuristic's have 64 at least


def architecture(device: torch.device) -> str:
    """Of a device: sm_90, gfx942 and the like; of a GPU with its name behind a colon, by which tables are stored."""
    return _architecture(device) if device.type == "cuda" else _switches.get().arch


@lru_cache(maxsize=16)
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return f"{properties.gcnArchName.split(':')[0]}:{properties.name}"
    return f"sm_{properties.major}{properties.minor}:{properties.name}"


def _tables(arch: str) -> tuple[Table, ...]:
    """Those in use for an architecture, the first one first; stored ones are read when they are first asked for."""
    chosen = _switches.get().tables
    if chosen is not None:
        return chosen
    if arch not in _stored:
        _stored[arch] = _measured(arch.partition(":")[2])
    return (_stored[arch],)


def _measured(gpu: str) -> dict[Key, LaunchConfig]:
    """What is stored for a GPU, the user's own before what ships. Never raises, but may warn."""
    merged: dict[Key, LaunchConfig] = {}
    for place in (shipped_file, user_file) if gpu else ():
        try:
            merged |= stored_table(place(gpu), gpu)
        except (OSError, ValueError) as error:
            text = f"tuned configurations are not used, the heuristic is: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    return merged


def stored_table(path: Path, gpu: str) -> dict[Key, LaunchConfig]:
    """What a file holds, nothing where there is none. Raises OSError; ValueError where it is no table for `gpu`."""
    rows = read(path, gpu)
    try:
        return dict(map(_parse, rows))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of configurations: {error}") from error


def shipped(gpu: str) -> dict[Key, LaunchConfig]:
    """The table that ships for a GPU, empty if none does: for compiling ahead of time. Raises as `stored_table`."""
    return stored_table(shipped_file(gpu), gpu)


def _parse(row: Row) -> tuple[Key, LaunchConfig]:
    key, config = Key(**row["key"]), LaunchConfig(**row["config"])
    if key.kernel not in TWO_STAGES or not all(type(number) is int and number > 0 for number in key[1:]):
        raise ValueError(f"{row['key']} is no key")
    whole = all(type(number) is int for number in config)
    tiles = whole and all(is_tile(size) for name, size in config._asdict().items() if name.startswith("block"))
    if not tiles or config.num_warps not in (1, 2, 4, 8, 16) or config.num_stages not in range(1, 9):
        raise ValueError(f"{row['config']} is no configuration")
    return key, config


def config_for(
    kernel: str, reduction: int, block_n: int, element_size: int, arch: str = "sm_90", taps: int = 1
) -> LaunchConfig:
    """The configuration for (kernel, reduction length of one tap, output tile, bytes of an element, GPU, taps)."""
    key = Key(kernel, reduction, block_n, element_size, taps)
    switches = _switches.get()
    if switches.keys is not None:
        switches.keys.append(key)
    chosen = switches.pinned.get(kernel)
    if chosen is None:
        chosen = next((table[key] for table in _tables(arch) if key in table), None) or heuristic(key, arch)
    return as_fenced(chosen._replace(block_n=block_n), arch)

"""One instruction of a sound kernel is taken away at a time: is it noticed?

A launch is recorded with the memory it began with, and replayed with the changed text from the same memory. What stays
silent in every schedule ordered nothing in this launch, or the machine is blind to it: `Kept.silent` says where it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from helpers import everything

from emulator.cases import DTYPES, Case
from emulator.check import allowed_on_a_cpu, cast, emulated
from emulator.driver import Emulator, Launch

FAULTS = {
    "barrier deleted": (r"bar\.sync\s+0;", ""),
    "wait deleted": (r"(?:cp\.async|wgmma)\.wait_group(?:\.sync\.aligned)?\s+\d+;", ""),
    "atomic relaxed": (r"\.acq_rel\.", ".relaxed."),
}


@dataclass
class Recording:
    """A launch, and copies of the storages of its tensors before it was made."""

    launch: Launch
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for _, value in self.launch.arguments:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.storages.setdefault(storage.data_ptr(), storage.clone())

    def again(self) -> Launch:
        """The same launch on fresh copies of that memory."""
        fresh = {start: storage.clone() for start, storage in self.storages.items()}
        arguments = tuple(
            (kind, _on(fresh[value.untyped_storage().data_ptr()], value) if isinstance(value, torch.Tensor) else value)
            for kind, value in self.launch.arguments
        )
        return replace(self.launch, arguments=arguments)


def _on(storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=like.dtype).set_(storage, like.storage_offset(), like.shape, like.stride())


@dataclass
class Share:
    """Of one kernel and one fault: how many places there are, and the lines of those that stayed silent."""

    kernel: str
    fault: str
    places: int
    silent: list[str]


def record(case: Case, dtype: str, architecture: str) -> list[Recording]:
    """The launch of every kernel that a case meets in training: of several, that of the longest text."""
    found: dict[str, Recording] = {}

    def hear(launch: Launch) -> None:
        longest = found.get(launch.function.name)
        if longest is None or len(launch.function.ptx) > len(longest.launch.function.ptx):
            found[launch.function.name] = Recording(launch)

    module, x = cast(case.build(True), DTYPES[dtype]), case.input(DTYPES[dtype])
    with allowed_on_a_cpu(), emulated(case, architecture, 0) as gpu:
        gpu.hear = hear
        everything(module, x, case.run)
    return list(found.values())


def errors(recording: Recording, ptx: str, architecture: str, seed: int) -> bool:
    """Whether anything is found when the launch runs with this text."""
    with Emulator(architecture, seed, change=lambda name, text: ptx) as gpu:
        return bool(gpu.run(recording.again()).errors)


def shares(recording: Recording, architecture: str, seeds: Sequence[int]) -> list[Share]:
    """Every fault at every place of a kernel, with every seed until one notices."""
    function = recording.launch.function
    if any(errors(recording, function.ptx, architecture, seed) for seed in seeds):
        raise ValueError(f"{function.name} is not sound as it stands")
    found = []
    for fault, (pattern, by) in FAULTS.items():
        places = list(re.finditer(pattern, function.ptx))
        silent = []
        for place in places:
            broken = function.ptx[: place.start()] + by + function.ptx[place.end() :]
            if not any(errors(recording, broken, architecture, seed) for seed in seeds):
                silent.append(line_of(function.ptx, place.start()))
        if places:
            found.append(Share(function.name, fault, len(places), silent))
    return found


def line_of(ptx: str, at: int) -> str:
    """The Python line that an instruction came from."""
    lines = re.findall(r"\.loc.*//\s*(?:\S*/)?(\S+?:\d+)", ptx[:at])
    return lines[-1] if lines else "?"

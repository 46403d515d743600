"""One instruction of a sound kernel is taken away at a time: is it noticed?

A launch is recorded with the memory it began with, and replayed with the changed text from the same memory. What stays
silent in every schedule ordered nothing in this launch, or the machine is blind to it: `Share.silent` says where it is.
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
    """Of every kernel that a case meets in training, the launch that executes the most."""
    largest: dict[str, tuple[int, int]] = {}
    recordings: list[Recording] = []

    def hear(launch: Launch) -> None:
        if any(number == len(gpu.results) for _, number in largest.values()):
            recordings.append(Recording(launch))

    module, x = cast(case.build(True), DTYPES[dtype]), case.input(DTYPES[dtype])
    with allowed_on_a_cpu():
        with emulated(case, architecture, 0) as gpu:
            everything(module, x, case.run)
        for number, (name, result) in enumerate(gpu.results):
            largest[name] = max(largest.get(name, (0, 0)), (sum(result.instructions.values()), number))
        with emulated(case, architecture, 0) as gpu:
            gpu.hear = hear
            everything(module, x, case.run)
    return recordings


def outcome(recording: Recording, ptx: str, architecture: str, seed: int) -> tuple[bool, list[bytes]]:
    """Whether anything is found when the launch runs with this text, and the memory behind it."""
    launch = recording.again()
    with Emulator(architecture, seed, change=lambda name, text: ptx) as gpu:
        found = bool(gpu.run(launch).errors)
    tensors = [value.untyped_storage() for _, value in launch.arguments if isinstance(value, torch.Tensor)]
    return found, [torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes() for storage in tensors]


def shares(recording: Recording, architecture: str, seeds: Sequence[int]) -> list[Share]:
    """Every fault at every place of a kernel: noticed with any seed if something is found, or bits are others."""
    function = recording.launch.function
    sound = [outcome(recording, function.ptx, architecture, seed) for seed in seeds]
    if any(errors or memory != sound[0][1] for errors, memory in sound):
        raise ValueError(f"{function.name} is not sound as it stands")
    found = []
    for fault, (pattern, by) in FAULTS.items():
        places = list(re.finditer(pattern, function.ptx))
        silent = []
        for place in places:
            broken = function.ptx[: place.start()] + by + function.ptx[place.end() :]
            if all(outcome(recording, broken, architecture, seed) == sound[0] for seed in seeds):
                silent.append(line_of(function.ptx, place.start()))
        if places:
            found.append(Share(function.name, fault, len(places), silent))
    return found


def line_of(ptx: str, at: int) -> str:
    """The Python line that an instruction came from."""
    lines = re.findall(r"\.loc.*//\s*(?:\S*/)?(\S+?:\d+)", ptx[:at])
    return lines[-1] if lines else "?"

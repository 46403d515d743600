"""Triton's active driver without a GPU: its JIT specialises and compiles every launch, the machine executes it.

    with Emulator("sm_80", seed=3) as gpu:
        kernel[grid](tensors and numbers …)      # CPU tensors; any kernel, any launcher on top of it
    assert not gpu.errors

Signature, divisibility, ones, `do_not_specialize` and options are what Triton takes from the very arguments, as it does
on a GPU. No machine code is made: the PTX itself takes the place of the cubin.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as registry

from emulator import build, machine
from emulator.ptx import parse
from emulator.reading import read

SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448}  # bytes of one program
FLOATS = {"fp16": ("e", "H"), "fp32": ("f", "I"), "fp64": ("d", "Q")}
STAGES = "the PTX stands for the machine code"


@dataclass(frozen=True)
class Loaded:
    """What Triton takes for a function on the GPU."""

    name: str
    ptx: str
    shared: int


@dataclass(frozen=True)
class Launch:
    """A launch as Triton makes it; `arguments` without what is compiled in, each with its type."""

    function: Loaded
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, Any], ...]


@contextmanager
def ptx_alone() -> Iterator[None]:
    """Inside, Triton compiles as far as PTX, which takes half as long, into a cache of its own."""
    with triton.knobs.cache.scope(), triton.knobs.runtime.scope():
        triton.knobs.cache.dir = str(build.folder() / "triton")
        triton.knobs.runtime.add_stages_inspection_hook = _without_machine_code
        yield


class Emulator:
    """Triton's driver inside a `with` block, for one architecture and one schedule.

    `change(name, ptx)` may alter a kernel's text before it runs; `hear(launch)` sees every launch before it is made.
    """

    def __init__(
        self, architecture: str = "sm_80", seed: int = 0, *, late: int | None = None, track: bool = True,
        change: Callable[[str, str], str] | None = None, hear: Callable[[Launch], None] | None = None,
    ) -> None:  # fmt: skip
        self.architecture, self.seed, self.late, self.track = architecture, seed, late, track
        self.change, self.hear = change, hear
        self.results: list[tuple[str, machine.Result]] = []
        self.addressed: list[torch.Tensor] = []  # what launches that are handed bare addresses may touch
        self.by_address = 0  # launches of that kind
        self.utils = self
        self.launcher_cls = _Launcher
        self._exit = ExitStack()

    def __enter__(self) -> Emulator:
        build.library()
        self._exit.enter_context(ptx_alone())
        self._exit.callback(registry.set_active, registry._active)
        registry.set_active(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def run(self, launch: Launch) -> machine.Result:
        """Execute a launch."""
        if self.hear is not None:
            self.hear(launch)
        function = launch.function
        kernel = parse(function.ptx if self.change is None else self.change(function.name, function.ptx))
        values = [value for _, value in launch.arguments]
        by_address = any(kind[0] == "*" and isinstance(value, int) for kind, value in launch.arguments)
        self.by_address += by_address
        memory = {}
        for value in values + self.addressed * by_address:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                memory[storage.data_ptr()] = storage.nbytes()
        bits = [_bits(kind, value) for kind, value in launch.arguments]
        bits += [0] * (len(kernel.parameters) - len(bits))  # scratch memory of Triton's own, unused
        seed = 0 if self.seed == 0 else self.seed * 1000003 + len(self.results)
        schedule = machine.Schedule(seed, self.late)
        result = machine.launch(
            kernel, launch.grid, bits, list(memory.items()), function.shared, schedule, track=self.track
        )
        met = {report.finding for report in result.reports}
        result.reports.extend(machine.unexecuted(kernel, *found) for found in read(kernel) if found[0] not in met)
        self.results.append((function.name, result))
        return result

    @property
    def reports(self) -> list[machine.Report]:
        return [report for _, result in self.results for report in result.reports]

    @property
    def errors(self) -> list[machine.Report]:
        return [report for report in self.reports if report.is_error]

    def findings(self) -> Counter[str]:
        """How often every error and every note was met."""
        found: Counter[str] = Counter()
        for report in self.reports:
            found[report.finding] += report.times
        return found

    def counts(self) -> Counter[str]:
        """Launches, programs, bytes loaded and stored, warp instructions in all and by kind."""
        total: Counter[str] = Counter(launches=len(self.results))
        for _, result in self.results:
            total.update(result.instructions)
            total.update(
                instructions=sum(result.instructions.values()), programs=result.programs, loaded=result.loaded,
                stored=result.stored,
            )  # fmt: skip
        return total

    # What Triton asks of a driver, and of its `utils`.
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return int(self.architecture.removeprefix("sm_"))  # kernels of every architecture are kept apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        limit = SHARED_LIMIT[self.architecture]
        return {"max_shared_mem": limit, "multiprocessor_count": 4, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Loaded, int, int, int]:
        return object(), Loaded(name, binary.decode(), shared), 0, 0, 1024


class _Launcher:
    """What Triton calls in place of CUDA's launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = tuple(source.signature.values())
        self.target = metadata.target

    def __call__(self, x: int, y: int, z: int, stream: int, function: Loaded, *rest: Any) -> None:
        emulator = registry.active
        if not isinstance(emulator, Emulator) or emulator.get_current_target() != self.target:
            raise RuntimeError(f"{function.name} was compiled for {self.target}, and that is not the active driver's")
        _packed, _metadata, _enter, _leave, *arguments = rest
        given = tuple((k, v) for k, v in zip(self.kinds, arguments, strict=True) if k != "constexpr")
        emulator.run(Launch(function, (x, y, z), given))


def _without_machine_code(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """Triton's hook into its stages; called without any it names itself, for the key of what is cached."""
    if stages is None:
        return STAGES, STAGES
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


def _bits(kind: str, value: Any) -> int:
    """An argument as a kernel parameter holds it."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        floating, whole = FLOATS[kind]
        return int(struct.unpack(f"<{whole}", struct.pack(f"<{floating}", value))[0])
    return 0 if value is None else int(value)

"""Launching again what was launched before, without Triton's binder, which costs more than a small kernel runs.

A pass over a stage launches the same kernels with the same numbers whenever its tensors have the same shapes; only the
addresses differ. The first time the launches are noted: the compiled kernels, and every address as an offset into one
of the pass's tensors. After that they are handed to the driver directly. An allocator that caches gives the same blocks
step after step, so that arguments are put together anew only where an address is another one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqconv_triton.kernels import launch
from seqconv_triton.kernels.configs import pinned

MOST = 256  # programs that are remembered
RECENT = 4  # sets of addresses that a program knows: layers of the same shapes take turns

Places = tuple[tuple[int, int, int], ...]
Ready = tuple[Callable[..., None], int, int, int, Any, Any, list[Any]]  # launcher, grid, function, metadata, arguments


class Entry(NamedTuple):
    """A launch of a compiled kernel, and where addresses go among its arguments: (argument, tensor, bytes into it)."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: Any
    metadata: Any
    arguments: list[Any]
    places: Places


class Program:
    """The launches of a pass, and their arguments at addresses that came again of late: others are not worth memory."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.known: tuple[tuple[list[int], list[Ready]], ...] = ()  # the newest first

    def at(self, addresses: list[int]) -> Iterable[Ready]:
        """The launches for tensors at these addresses."""
        before = self.known  # once: another thread may put its own in front
        for known, ready in before:
            if known == addresses:
                if not ready:
                    ready[:] = [self._ready(entry, addresses) for entry in self.entries]
                return ready
        self.known = (addresses, []), *before[: RECENT - 1]
        return (self._ready(entry, addresses) for entry in self.entries)

    @staticmethod
    def _ready(entry: Entry, addresses: list[int]) -> Ready:
        arguments = entry.arguments.copy()
        for position, tensor, offset in entry.places:
            arguments[position] = addresses[tensor] + offset
        return entry.run, *entry.grid, entry.function, entry.metadata, arguments


_programs: OrderedDict[Hashable, Program | None] = OrderedDict()  # None: cannot be replayed
_UNKNOWN = Program([])


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples and lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(*value)


def replayed(name: Hashable, memory: tuple[Any, ...], launches: Callable[[], None]) -> None:
    """Run `launches`, which does nothing but launch kernels on parts of the tensors in `memory`, or replay it.

    `name` is all that it depends on beside those tensors' shapes, strides, dtypes and alignment.
    """
    tensors = list(tensors_in(*memory))
    if not replayable(tensors):
        launches()
        return
    key = (name, pinned(), launch.precision(torch.float32), *(_signature(tensor) for tensor in tensors))
    program = _programs.get(key, _UNKNOWN)  # once: another thread may drop it
    if program is _UNKNOWN:
        _programs[key] = _noted(tensors, launches)
        while len(_programs) > MOST:
            _programs.popitem(last=False)
        return
    if program is None:
        launches()
        return
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    for run, x, y, z, function, metadata, arguments in program.at([tensor.data_ptr() for tensor in tensors]):
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)


def replayable(tensors: list[Tensor]) -> bool:
    """Whether nobody listens, and kernels are really compiled and launched."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    watched = launch.listening() or any(getattr(hook, "calls", hook) for hook in hooks)
    return not (watched or launch.INTERPRETED or any(tensor.is_meta for tensor in tensors))


def _signature(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


def _noted(tensors: list[Tensor], launches: Callable[[], None]) -> Program | None:
    """Launch, and note it; None where an address lies in none of the tensors, or in several."""
    spans = [(t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors]
    ordered = sorted(span for span in spans if span[0] < span[1])
    unique = all(before[1] <= after[0] for before, after in pairwise(ordered))
    entries: list[Entry] = []
    complete = unique

    def note(kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        nonlocal complete
        values = [arguments[name] for name in kernel.arg_names]
        places = []
        for position, value in enumerate(values):
            if isinstance(value, Tensor):
                at = value.data_ptr()
                owners = [i for i, (start, stop) in enumerate(spans) if start <= at < stop]
                complete = complete and len(owners) == 1
                places.append((position, owners[0] if owners else 0, at - spans[owners[0]][0] if owners else 0))
                values[position] = 0
        whole = (*grid, 1, 1)[:3]
        ready = compiled.run, (whole[0], whole[1], whole[2]), compiled.function, compiled.packed_metadata
        entries.append(Entry(*ready, values, tuple(places)))

    with launch.note(note):
        launches()
    return Program(entries) if complete else None


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()

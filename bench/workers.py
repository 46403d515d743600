"""A contender in a process of its own, so that its C heap is as its own runs leave it: a user's process has one model.

The parent asks, one worker at a time, and the worker answers; meanwhile the others wait. On Linux a server that has
imported torch once forks a worker in 10 ms; elsewhere a worker is a new interpreter, which takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from bench import subjects
from bench.cases import Case
from bench.contenders import Build, Found, build
from bench.participants import Local, Lost, reason
from bench.processes import kill_group
from bench.results import Row

# Forking behind these imports is safe: they start no thread. The compiler's are here since its time is without them.
PRELOADED = ["bench.workers", "torch._dynamo", "torch._inductor.compile_fx"]
REST = 0.01  # seconds before a run, in which the threads of who ran before stop looking for more work and sleep
GRACE = 2.0  # seconds for a worker to end
AWAKE = 0.02  # seconds after which one's own threads have found a core each: what ends within has been slowed by them


@dataclass(frozen=True)
class Task:
    """What a worker needs to know. Its module, weights and input come from the seeds that the parent's come from."""

    label: str
    case: Case
    make_contender: Build = build
    cold: bool = True
    threads: int = 1
    heap: int = 0

    def begin(self) -> Local:
        torch.set_num_threads(self.threads)
        device = torch.device("cpu")
        base, shape = subjects.make(self.case.subject, self.case.image)
        x = subjects.random_input(shape, self.case.batch, device)
        return Local(self.make_contender(self.label, self.case, base, x), self.case, device, self.cold)


def shaken(seed: int) -> list[bytearray]:
    """Blocks among which the heap begins; the same for every contender. They have to be kept.

    Where the first blocks lie decides whether the C library returns a run's memory to the system and faults it in
    again in the next run. In processes of one program that is always the same, by chance good or bad.
    """
    sizes = random.Random(seed)
    blocks = [bytearray(int(2 ** sizes.uniform(8, 20))) for _ in range(64)]
    return blocks[::2]


class Worker:
    """The parent's end: a participant whose every method is a question to the worker. Raises Lost for its failures."""

    def __init__(self, task: Task) -> None:
        context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        self.found = Path(self.folder.name) / "found.pt"
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=serve, args=(other_end, task, self.found), daemon=True)
        self.process.start()
        other_end.close()  # the worker's death is then the end of the pipe

    def first(self) -> tuple[Row, Found]:
        facts: Row = self.ask("first")
        found: Found = torch.load(self.found)
        self.folder.cleanup()
        return facts, found

    def run(self) -> dict[str, float]:
        time.sleep(REST)
        seconds: dict[str, float] = self.ask("run")
        return seconds

    def memory(self) -> Row:
        found: Row = self.ask("memory")
        return found

    def ask(self, request: str) -> Any:
        """The answer; a text is what went wrong."""
        try:
            self.connection.send(request)
            if self.connection not in wait([self.connection, self.process.sentinel]):
                raise EOFError
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise Lost(ending(self.process.exitcode)) from None
        if isinstance(answer, str):
            raise Lost(answer)
        return answer

    def close(self) -> None:
        self.connection.close()  # on which it ends by itself
        self.process.join(GRACE)
        kill_group(self.process)
        self.process.join()
        self.folder.cleanup()


def ending(status: int) -> str:
    """How a process died."""
    if status == -getattr(signal, "SIGKILL", 9):
        return "its process was killed, as the system does when memory runs out"
    return f"its process ended with {status}"


def serve(connection: Connection, task: Task, path: Path) -> None:
    """The worker's end: answer until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent, which ends its workers
    if hasattr(os, "setsid"):
        os.setsid()  # leads a group, with the compilers that it starts
    blocks = shaken(task.heap)
    local: Local | None = None
    with suppress(EOFError, OSError):  # of the pipe: the parent has closed it, or is gone
        while blocks:
            request = connection.recv()
            try:
                local = task.begin() if local is None else local
                answer: Row | str = respond(local, request, path)
            except Exception as error:  # the parent's row says it
                answer = reason(error)
            connection.send(answer)


def respond(local: Local, request: str, path: Path) -> Row:
    if request == "run":
        return run(local)
    if request == "memory":
        return local.memory()
    facts, found = local.first()
    torch.save(found, path)  # straight from the tensors: bytes for the pipe would be large blocks of the heap
    return facts


def run(local: Local) -> dict[str, float]:
    """Seconds of one run; of a short one, which is repeated, the last time."""
    awake = time.perf_counter() + AWAKE
    seconds = local.run()
    while time.perf_counter() < awake:
        seconds = local.run()
    return seconds

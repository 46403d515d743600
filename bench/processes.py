"""Processes that must not outlive their time: each leads a group, and the whole group is killed at the deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import IO


@dataclass
class Background:
    """A running process and the file it prints into: a pipe that nobody reads yet would stop it."""

    process: subprocess.Popen[bytes]
    output: IO[bytes] | None = None

    def end_by(self, deadline: float) -> int | None:
        """Its exit status, or None where it had to be killed at the deadline (time.monotonic)."""
        try:
            return self.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        kill_group(self.process)
        self.process.wait()

    def close(self) -> None:
        """End it, and forget what it has printed."""
        self.kill()
        if self.output is not None:
            self.output.close()

    def lines(self) -> list[str]:
        """What it has printed."""
        if self.output is None:
            return []
        number = self.output.fileno()  # whose position is the process's, too: it must not be moved
        return os.pread(number, os.fstat(number).st_size, 0).decode(errors="replace").splitlines()

    def says(self, line: str, deadline: float) -> bool:
        """Wait until it has printed a line: False where it ends before, or the deadline comes (time.monotonic)."""
        while line not in self.lines():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return line in self.lines()
            time.sleep(0.05)
        return True


def kill_group(leader: subprocess.Popen[bytes] | BaseProcess) -> None:
    """Whatever of the group is left: test workers and compilers outlive who started them."""
    assert leader.pid, "not started"  # 0 would be one's own group
    try:
        os.killpg(leader.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        leader.kill()


def spawn(command: Sequence[str], quiet: bool = True) -> Background:
    """Start a command in a process group of its own; quiet ones print into a file."""
    output = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115 - it lives as long as the process
    streams = None if output is None else output
    process = subprocess.Popen(
        list(command), stdout=streams, stderr=subprocess.STDOUT if quiet else None, start_new_session=True
    )
    return Background(process, output)


def python(*arguments: str) -> list[str]:
    """The command `python -m …` of this interpreter."""
    return [sys.executable, "-m", *arguments]

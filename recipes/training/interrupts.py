"""Ctrl-C and SIGTERM: noticed at once, acted upon where the run can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopped(KeyboardInterrupt):
    """A run that a signal ended, after it was saved. `status` is the shell's: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {where}")
        self.status = 128 + number


class Interrupts:
    """While entered, the first SIGINT or SIGTERM is only noted in `number` (0: none); a second Ctrl-C interrupts.

    In another thread than the main one, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

"""Ctrl-C and SIGTERM as a polite request: the step in hand is finished and saved first."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from pvdm_fast.errors import Interrupted
from pvdm_fast.jobs.processes import Processes


class StopRequest:
    """While active, the first SIGINT or SIGTERM is remembered; a second one stops at once."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        print("\nfinishing this step, then saving; once more stops at once", file=sys.stderr, flush=True)

    def agreed(self) -> int | None:
        """The signal that has come to this or another process; all of them call this at the same place."""
        return self.processes.largest(self.number or 0) or None

    def check(self) -> None:
        """Raises Interrupted if a signal has come to any process, in all of them."""
        if number := self.agreed():
            raise Interrupted(number)

"""A signal as a polite request: the current step is finished and saved first."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType

from pvdm_fast.errors import Interrupted, StoppedAtOnce
from pvdm_fast.jobs.processes import Processes
from pvdm_fast.jobs.signals import handled

# A launcher passes on a signal that its processes have already got. Within this time it counts as the same request.
SAME_SECONDS = 0.5


class StopRequest:
    """While active, the first signal that ends a job is remembered. A second one stops at once, with its exit code.

    Outside the main thread, signals stay as they are.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.number: int | None = None
        self._since = 0.0
        self._waiting = False
        self._ending = ExitStack()

    def __enter__(self) -> StopRequest:
        self._ending.enter_context(handled(self._handle))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
            print("\nfinishing this step, then saving; once more stops at once", file=sys.stderr, flush=True)
            if self._waiting:
                raise StoppedAtOnce(number)
        elif now - self._since > SAME_SECONDS:
            raise StoppedAtOnce(number)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that a signal may leave at any point, because what it waits for may never come.

        It is left in this process only. Several have to agree afterwards, where all of them meet.

        Raises:
            Interrupted: a signal came while it waited, or before.
        """
        try:
            self._waiting = True
            if self.number is not None:
                raise Interrupted(self.number)
            yield
        except StoppedAtOnce as stop:
            raise Interrupted(stop.exit_code - 128) from None
        finally:
            self._waiting = False

    def agreed(self) -> int | None:
        """The signal that has come to this or another process; all of them call this at the same place."""
        return self.processes.largest(self.number or 0) or None

    def check(self) -> None:
        """Raises Interrupted if a signal has come to any process, in all of them."""
        if number := self.agreed():
            raise Interrupted(number)

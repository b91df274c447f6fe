"""Output streams that never end a job: not by a closed pipe, a full log disk, or characters that a terminal lacks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Steady:
    """A text stream that prints what it can, and drops the rest."""

    def __init__(self, stream: Any) -> None:
        # None if it was closed when Python started
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.lost = stream is None

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        # closed in the meantime, or a signal handler printed during a print
        except (OSError, ValueError, RuntimeError):
            self.lost = True
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError, RuntimeError):
            self.lost = True

    def isatty(self) -> bool:
        return not self.lost and bool(self.stream.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def steady_output() -> Iterator[None]:
    """sys.stdout and sys.stderr as `Steady` streams while the block runs."""
    before = sys.stdout, sys.stderr
    steady = tuple(Steady(stream) for stream in before)
    sys.stdout, sys.stderr = steady
    try:
        yield
    finally:
        for stream, original in zip(steady, (sys.__stdout__, sys.__stderr__), strict=True):
            stream.flush()
            if stream.lost and stream.stream is original:
                _leave_nothing(stream.stream)
        if (sys.stdout, sys.stderr) == steady:
            sys.stdout, sys.stderr = before


def _leave_nothing(stream: Any) -> None:
    """Drop what a stream still holds. Python's own last flush would fail, and change the exit code."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
    except (OSError, ValueError):
        pass

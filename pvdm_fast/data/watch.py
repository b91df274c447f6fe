"""A time limit for every file that is read, and a note that outlives the process: for decoders that hang or crash.

A decoder may never return, because a file system doesn't answer, or because a file was made to keep it busy. In a data
worker SIGALRM then ends the process, whatever it is doing. The loader finds the file in the note and goes on without
it. In the main process the limit can only interrupt code that returns to Python now and then, or that waits in the
kernel. It can't interrupt a loop inside the decoder.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pvdm_fast.data.errors import UnreadableVideo
from pvdm_fast.jobs.reading import time_limit

LONGEST_PATH = 4096
TOO_SLOW, CRASHED = "could not be read within", "ended the process that read it"
_HEADER = 16  # bytes: process id, length of the name

_note: np.ndarray | None = None  # this worker's row of the notes


class TooSlow(UnreadableVideo):
    """A file took longer than it may. It isn't tried again."""


class Notes:
    """One row per worker, in memory shared with it: its process id, and the file that it is reading."""

    def __init__(self, workers: int) -> None:
        self.rows = torch.zeros(workers, _HEADER + LONGEST_PATH, dtype=torch.uint8).share_memory_()

    def file_of(self, pid: int) -> str | None:
        """The file that a worker was reading at its last note. None between files."""
        for row in self.rows.numpy():
            owner, length = row[:_HEADER].view(np.int64).tolist()
            if owner == pid and length:
                return os.fsdecode(row[_HEADER : _HEADER + length].tobytes())
        return None

    def any_file(self) -> bool:
        """Whether any worker is reading a file."""
        return bool((self.rows.numpy()[:, 8:_HEADER].copy().view(np.int64) > 0).any())


def begin_notes(notes: Notes, worker: int) -> None:
    """In a worker: from now on `reading` writes to its row, and an alarm ends the process."""
    global _note
    _note = notes.rows[worker].numpy()
    _note[:_HEADER].view(np.int64)[:] = os.getpid(), 0
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@contextmanager
def reading(name: str, seconds: float) -> Iterator[None]:
    """Allow the block ``seconds`` (0: any time) to read the file ``name``.

    In a worker of the loader the process ends when the time is over. Elsewhere `TooSlow` is raised as soon as Python
    runs again, in the main thread only. There is no limit if another alarm is already set.
    """
    if _note is None:
        with time_limit(seconds, lambda: TooSlow(too_slow(seconds))):
            yield
        return
    encoded = np.frombuffer(os.fsencode(name)[:LONGEST_PATH], np.uint8)
    _note[_HEADER : _HEADER + len(encoded)] = encoded
    length = _note[8:_HEADER].view(np.int64)
    length[:] = len(encoded)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        length[:] = 0


def too_slow(seconds: float) -> str:
    return f"{TOO_SLOW} {seconds:g} s"


def is_lasting(reason: str) -> bool:
    """Whether this reason concerns every window of the file, not only the damaged one."""
    return reason.startswith((TOO_SLOW, CRASHED))

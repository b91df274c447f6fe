"""How batches come from data workers: in shared memory, which may be full, and errors with their own sentence."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from pvdm_fast.data.clips import Batch, ClipDataset, Item, collate
from pvdm_fast.data.errors import DataError
from pvdm_fast.data.watch import Notes

SHARED_MEMORY = Path("/dev/shm")
REMEDY = (
    "give the container more shared memory (docker run --shm-size 8g), or use fewer --workers (0 reads the clips in "
    "the process itself)"
)
ROOM_SECONDS = 20.0  # how long a worker waits for room: other batches leave when they are taken
LOST_SECONDS = 300.0  # how long a batch may take while no worker has a file in hand
POLL_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1  # prctl.h


class Guarded(Dataset[Item]):
    """A dataset as a worker reads it: batches of draws, and what is wrong with the data as a value.

    Raised in a worker, an error would reach the training process with a traceback as its message.
    """

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, draws: Sequence[int]) -> list[Item] | DataError:
        try:
            return [self.dataset.read(draw) for draw in draws]
        except DataError as error:
            return DataError(str(error))


def shared_batch(items: list[Item] | DataError) -> Batch | DataError:
    """A batch in shared memory, where it would otherwise be lost later, in a thread whose errors nobody sees."""
    if isinstance(items, DataError):
        return items
    batch, deadline = collate(items), time.monotonic() + ROOM_SECONDS
    size = batch["video"].nbytes
    while True:
        free, whole = _room()
        try:
            if free > size:
                batch["video"].share_memory_()
                return batch
        except RuntimeError:
            pass  # another worker was quicker
        if time.monotonic() > deadline or whole < size:
            return no_room(size)
        time.sleep(0.2)


def _room() -> tuple[float, float]:
    """Bytes of shared memory that are free, and in all; infinite where it is no file system."""
    try:
        facts = os.statvfs(SHARED_MEMORY)
    except OSError:
        return float("inf"), float("inf")
    return facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize


def _free() -> str:
    return f"{SHARED_MEMORY} has {_room()[0] / 1e6:.1f} MB free"


def no_room(size: int) -> DataError:
    return DataError(f"a batch of clips takes {size / 1e6:.1f} MB of shared memory, but {_free()}: {REMEDY}")


def cannot_start(workers: int, error: OSError | RuntimeError) -> DataError:
    reason = getattr(error, "strerror", None) or _free()
    return DataError(f"cannot start {workers} data workers: {reason}; {REMEDY}")


class Patience:
    """How long a batch may be waited for: while workers have files in hand, as long as these may take."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.since, self.state = time.monotonic(), b""

    def check(self) -> None:
        """Raises DataError where nothing has moved for too long, and no worker is at a file."""
        state = self.notes.rows.numpy().tobytes()
        if state != self.state or self.notes.any_file():
            self.since, self.state = time.monotonic(), state
        elif time.monotonic() - self.since > LOST_SECONDS:
            raise DataError(
                f"no batch of clips came for {LOST_SECONDS:g} s, while no data worker had a file in hand "
                f"({_free()}): {REMEDY}"
            )


def die_with_parent(parent: int) -> None:
    """End this process by SIGKILL as soon as the thread that started it ends, however that happens (Linux)."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:  # it ended before that
        os._exit(1)

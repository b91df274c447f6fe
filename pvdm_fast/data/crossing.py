"""How batches travel from data workers: through shared memory, which may be full, with errors as plain sentences."""

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
ROOM_SECONDS = 20.0  # how long a worker waits for shared memory, which is freed as batches are taken
LOST_SECONDS = 300.0  # how long a batch may take while no worker reads a file
POLL_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1  # prctl.h


class Guarded(Dataset[Item]):
    """A dataset as a worker reads it: it returns batches of draws, and faults of the data as values.

    If a worker raised an error, the training process would get it with a traceback as its message.
    """

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, draws: Sequence[int]) -> list[Item] | DataError:
        try:
            return [self.dataset.read(draw) for draw in draws]
        except DataError as error:
            return DataError(str(error))


def shared_batch(items: list[Item] | DataError) -> Batch | DataError:
    """A batch in shared memory. Without this it could be lost later, in a thread whose errors nobody sees."""
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
            pass  # another worker was faster
        if time.monotonic() > deadline or whole < size:
            return no_room(size)
        time.sleep(0.2)


def _room() -> tuple[float, float]:
    """Bytes of shared memory: free, and in total. Infinite if it isn't a file system."""
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
    """How long to wait for a batch. While workers read files, it is as long as those files may take."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.since, self.state = time.monotonic(), b""

    def check(self) -> None:
        """Raises DataError if nothing has happened for too long and no worker is reading a file."""
        state = self.notes.rows.numpy().tobytes()
        if state != self.state or self.notes.any_file():
            self.since, self.state = time.monotonic(), state
        elif time.monotonic() - self.since > LOST_SECONDS:
            raise DataError(
                f"no batch of clips came for {LOST_SECONDS:g} s, while no data worker was reading a file "
                f"({_free()}): {REMEDY}"
            )


def die_with_parent(parent: int) -> None:
    """End this process with SIGKILL as soon as the thread that started it ends, for any reason (Linux)."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:  # the parent had already ended
        os._exit(1)

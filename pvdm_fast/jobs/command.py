"""How commands end: with one sentence for what you can mend, and the right exit code."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable
from types import FrameType

from pvdm_fast.errors import BackendError, Interrupted, StoppedAtOnce, UserError
from pvdm_fast.jobs.environment import rank_name
from pvdm_fast.jobs.signals import handled
from pvdm_fast.jobs.streams import steady_output

# Errors from disks, permissions, names or limits of the machine. Any other OSError is a fault of the program.
OUTER_FAULTS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
    | {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOMEM, errno.EAGAIN, errno.EMFILE}
)


def run_command(action: Callable[[], object], smaller: str = "take smaller sizes, or a smaller batch") -> int:
    """Run ``action``. User errors are printed as one sentence without a traceback. Returns the exit code.

    ``smaller``: what to change where memory gives out.

    A signal that ends a job ends the action at once and removes its temporary files, unless the action handles signals
    itself. Output that can't be written is dropped.
    """
    with steady_output(), handled(_stop):
        return _run(action, smaller)


def _run(action: Callable[[], object], smaller: str) -> int:
    rank = rank_name()
    label = "error" if rank == "0" else f"error in process {rank}"
    try:
        action()
    except (UserError, BackendError) as error:
        print(f"{label}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", UserError.exit_code)
    except OSError as error:
        if error.errno not in OUTER_FAULTS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"{label}: {place}{error.strerror}", file=sys.stderr)
        return UserError.exit_code
    except Interrupted as stop:
        return stop.exit_code
    except KeyboardInterrupt as stop:
        print("stopped at once", file=sys.stderr)
        return getattr(stop, "exit_code", 128 + signal.SIGINT)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        place = "out of the GPU's memory" if on_gpu(error) else "out of memory"
        print(f"{label}: {place}: {smaller}", file=sys.stderr)
        return UserError.exit_code
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise StoppedAtOnce(number)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in Python, on a GPU, or in PyTorch's allocator for CPUs."""
    return isinstance(error, MemoryError) or on_gpu(error) or "can't allocate memory" in str(error)


def on_gpu(error: BaseException) -> bool:
    """Whether an error is PyTorch's of a GPU whose memory is full."""
    return "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__}

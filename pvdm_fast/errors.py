"""Errors whose cause and cure lie with the user, and how the command line tools show them: one sentence each."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

# What a disk or its rights can do at any write or read; any other OSError is a fault of the program.
DISK_FAULTS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
)


class UserError(Exception):
    """Something the user can mend: a wrong option, a missing folder, a full disk."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """The loss stayed infinite or NaN for longer than the configuration allows."""

    exit_code = 3


class Interrupted(Exception):
    """Training stopped because of a signal, after saving; the exit code is the shell's: 130 or 143."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def run_command(action: Callable[[], object]) -> int:
    """Run ``action``; what users cause is printed as one sentence without a traceback. Returns the exit code."""
    from pvdm_fast.backends.choice import BackendError

    rank = os.environ.get("RANK", "0")  # set by torchrun and accelerate launch
    label = "error" if rank == "0" else f"error in process {rank}"
    try:
        action()
    except (UserError, BackendError) as error:
        print(f"{label}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", UserError.exit_code)
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"{label}: {place}{error.strerror}", file=sys.stderr)
        return UserError.exit_code
    except Interrupted as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0

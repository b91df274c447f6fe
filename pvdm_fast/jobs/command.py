"""How the command line tools end: one sentence for what the user can mend, and the right exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

from pvdm_fast.errors import BackendError, Interrupted, UserError

# What a disk or its rights can do at any write or read; any other OSError is a fault of the program.
DISK_FAULTS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
)


def run_command(action: Callable[[], object]) -> int:
    """Run ``action``; what users cause is printed as one sentence without a traceback. Returns the exit code."""
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

"""Ctrl-C while one of our commands is still importing what it needs: one line in place of Python's traceback.

The package's first import: what comes before it, 20 to 40 ms of Python's own start, is out of reach.
"""

from __future__ import annotations

import sys


def is_command() -> bool:
    """Whether this process is `python -m pvdm_fast.<command>`, and Python is still looking for that module."""
    # Then argv[0] is "-m", and the module's name stands in front of the other arguments.
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").startswith("pvdm_fast.")


def leave(number: int, frame: object) -> None:
    from os import _exit, write

    write(2, b"stopped at once\n")
    _exit(128 + number)


if is_command():  # in every other program signals are the program's own
    from signal import SIGINT, signal

    signal(SIGINT, leave)  # until the command handles signals itself

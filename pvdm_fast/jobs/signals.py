"""The signals with which a terminal or a scheduler ends a job, or warns that it will."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C, kill, a closed terminal, Ctrl-\, two warnings that Slurm, LSF and SGE are told to send, a limit of CPU time,
# a failing power supply.
ENDING = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGPWR,
)


def in_main_thread() -> bool:
    """Whether Python lets this thread install handlers of signals."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """In the block, ``handle`` is called at each of these signals. Outside the main thread nothing changes.

    A signal that was already ignored stays ignored, such as SIGHUP under nohup. SIGINT doesn't, because shell scripts
    ignore it for everything that they start in the background.
    """
    before: dict[int, Any] = {}
    if in_main_thread():
        for number in ENDING:
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for key, handler in before.items():
            signal.signal(key, signal.SIG_DFL if handler is None else handler)

"""Errors whose cause and cure lie with the user; `jobs/command.py` shows each as one sentence."""

from __future__ import annotations

import signal


class UserError(Exception):
    """Something the user can mend: a wrong option, a missing folder, a full disk."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """The loss stayed infinite or NaN for longer than the configuration allows."""

    exit_code = 3


class Interrupted(Exception):
    """Training stopped because of a signal, after saving; the exit code is the shell's, for example 130 or 143."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StoppedAtOnce(KeyboardInterrupt):
    """A signal that ends what is at work, wherever it is; nothing but the command itself catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped at once by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve; the message says why and what to do."""

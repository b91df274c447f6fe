"""Errors whose cause and cure lie with the user; `jobs/command.py` shows each as one sentence."""

from __future__ import annotations

import signal


def printable(text: object) -> str:
    """A text on one line that any terminal can show: control characters, marks that turn the direction of writing, and
    bytes that are not UTF-8 (as file names may hold them) are written as escapes such as ``\\x1b``."""
    shown = []
    for character in str(text):
        if character.isprintable():
            shown.append(character)
        elif "\udc80" <= character <= "\udcff":  # how Python stands for a byte that is not UTF-8
            shown.append(f"\\x{ord(character) - 0xDC00:02x}")
        else:
            shown.append(character.encode("unicode_escape").decode())
    return "".join(shown)


class UserError(Exception):
    """Something the user can mend: a wrong option, a missing folder, a full disk.

    The message is shown by :func:`printable`: it may hold the names of files, and those may hold anything.
    """

    exit_code = 2

    def __str__(self) -> str:
        return printable(super().__str__())


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

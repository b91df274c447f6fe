"""Errors that the user can mend. `jobs/command.py` shows each as one sentence."""

from __future__ import annotations

import signal


def printable(text: object) -> str:
    """A text on one line that any terminal can show.

    Control characters, marks that change the direction of writing, and bytes that aren't UTF-8 (file names may hold
    them) become escapes such as ``\\x1b``.
    """
    shown = []
    for character in str(text):
        if character.isprintable():
            shown.append(character)
        elif "\udc80" <= character <= "\udcff":  # Python's stand-in for a byte that isn't UTF-8
            shown.append(f"\\x{ord(character) - 0xDC00:02x}")
        else:
            shown.append(character.encode("unicode_escape").decode())
    return "".join(shown)


class UserError(Exception):
    """Something the user can mend: a wrong option, a missing folder, a full disk.

    The message is shown through `printable`, because it may hold file names, and those may hold anything.
    """

    exit_code = 2

    def __str__(self) -> str:
        return printable(super().__str__())


class NonFiniteLossError(UserError):
    """The loss was infinite or NaN for longer than the configuration allows."""

    exit_code = 3


class Interrupted(Exception):
    """Training stopped because of a signal, after saving. The exit code is the shell's, for example 130 or 143."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StoppedAtOnce(KeyboardInterrupt):
    """A signal that ends the work wherever it is. Only the command itself catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped at once by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class BackendError(RuntimeError):
    """A backend that was asked for by name can't be used. The message says why and what to do."""

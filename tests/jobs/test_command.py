"""Exit codes and sentences of a command, for everything that isn't the program's own fault."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import NoReturn

import pytest
import torch

from pvdm_fast.errors import Interrupted, StoppedAtOnce, UserError
from pvdm_fast.jobs.command import run_command
from pvdm_fast.jobs.signals import ENDING


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def action() -> NoReturn:
        raise error

    return action


def allocate() -> None:
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("action", "code", "sentence"),
    [
        (raising(UserError("no")), 2, "error: no\n"),
        (raising(OSError(errno.EMFILE, "Too many open files")), 2, "error: Too many open files\n"),
        (raising(OSError(errno.ENAMETOOLONG, "File name too long", "a")), 2, "error: a: File name too long\n"),
        (raising(MemoryError()), 2, "error: out of memory: take smaller sizes, or a smaller batch\n"),
        (allocate, 2, "error: out of memory: take smaller sizes, or a smaller batch\n"),
        (
            raising(torch.OutOfMemoryError("CUDA")),
            2,
            "error: out of the GPU's memory: take smaller sizes, or a smaller batch\n",
        ),
        (raising(KeyboardInterrupt()), 130, "stopped at once\n"),
        (raising(StoppedAtOnce(signal.SIGTERM)), 143, "stopped at once\n"),
        (raising(Interrupted(signal.SIGUSR1)), 138, ""),
        (lambda: None, 0, ""),
    ],
)
def test_how_a_command_ends(
    action: Callable[[], object], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(action) == code
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), OSError(errno.EBADF, "Bad file descriptor")])
def test_mistakes_of_the_program_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command(raising(error))


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_a_command_that_has_nothing_to_save(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        try:
            os.kill(os.getpid(), number)
        except Exception:
            raise AssertionError("nothing but the command catches it") from None

    before = signal.getsignal(number)
    assert run_command(action) == 128 + number
    assert capsys.readouterr().err == "stopped at once\n"
    assert signal.getsignal(number) == before

"""Commands as processes that can be killed at a chosen moment. They fork from one that has imported everything."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

TICK = os.sysconf("SC_CLK_TCK")
WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
LOG_BYTES = 1 << 20
COMMANDS = {"train": "pvdm_fast.train", "sample": "pvdm_fast.sample"}


@dataclass(frozen=True)
class Moment:
    """When to die by SIGKILL: after so many CPU seconds, or before the n-th change to files in `folder`."""

    cpu: float = float("inf")
    change: int = -1


@dataclass(frozen=True)
class Life:
    """How a process ended: its exit code (-9: killed), CPU seconds, number of changes to files, and output."""

    code: int
    cpu: float
    changes: int
    output: str


def _live(command: str, arguments: list[str], folder: str, moment: Moment, file_limit: int, record: str) -> None:
    log = os.open(record + ".log", os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    changes = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal changes
        writing = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if (writing or event in WRITES) and str(details[0]).startswith(folder):
            if changes == moment.change:
                os.kill(os.getpid(), signal.SIGKILL)
            changes += 1

    sys.addaudithook(watch)
    if file_limit >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    code = import_module(COMMANDS[command]).main(arguments)
    sys.stdout.flush()
    if file_limit < 0:
        Path(record).write_text(f"{time.process_time()} {changes}")
    os._exit(code)


def context() -> Any:
    """The process to fork from finds lives_preload through PYTHONPATH, because not every Python passes on
    sys.path."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["training.lives_preload"])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return forking


def _open_log(path: Path) -> int:
    """A named pipe: file size limits don't apply to it, and it holds all output of a short run."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    log = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, LOG_BYTES)
    return log


def live(
    command: str,
    arguments: list[str],
    folder: Path,
    moment: Moment = Moment(),
    *,
    file_limit: int = -1,
    record: Path | None = None,
) -> Life:
    """Run a command in a separate process until its end, or until `moment`.

    Args:
        folder: its files are watched.
        file_limit: largest file size in bytes. Writes beyond it fail.
        record: where the process writes its log and record. The default is next to the folder.
    """
    written = record or folder.with_name(f"{folder.name}.life")
    written.unlink(missing_ok=True)
    parameters = (command, arguments, str(folder), moment, file_limit, str(written))
    log = _open_log(Path(f"{written}.log"))
    process = context().Process(target=_live, args=parameters)
    process.start()
    assert process.pid is not None
    try:
        while process.is_alive():
            if cpu_seconds(process.pid) >= moment.cpu:
                process.kill()
            process.join(0.004 if moment.cpu < float("inf") else 120)
    finally:
        process.kill()
        process.join()
    output = os.read(log, LOG_BYTES).decode(errors="replace")
    os.close(log)
    cpu, changes = written.read_text().split() if written.exists() else ("0", "0")
    return Life(process.exitcode, float(cpu), int(changes), output)


def cpu_seconds(process: int) -> float:
    """CPU seconds of a process that may have ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK

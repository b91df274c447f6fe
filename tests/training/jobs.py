"""Jobs of several processes on this machine, joined by Gloo and forked from one that has imported everything."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from training.lives import context

from pvdm_fast.train import main


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start_job(
    arguments: Sequence[str], log: Path, world: int = 2, before: Callable[[], None] | None = None
) -> list[ForkServerProcess]:
    """Starts ``pvdm_fast.train`` in ``world`` processes. Each writes its output to ``log`` with its rank appended.

    Each of them calls ``before`` first.
    """
    port = free_port()
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        process = context().Process(
            target=_run, args=(list(arguments), log.with_name(f"{log.name}{rank}"), environment, before)
        )
        process.start()
        processes.append(process)
    return processes


def _run(arguments: list[str], log: Path, environment: dict[str, str], before: Callable[[], None] | None) -> None:
    os.environ.update(environment, OMP_NUM_THREADS="1")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if before is not None:
        before()
    sys.exit(main(arguments))


def finish(processes: Sequence[ForkServerProcess], seconds: float = 300) -> list[int | None]:
    """Waits for the processes to end. Returns exit codes, negative for a signal. None means that it had to be
    killed."""
    codes: list[int | None] = []
    for process in processes:
        process.join(seconds)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
    return codes


def run_job(arguments: Sequence[str], log: Path, world: int = 2, before: Callable[[], None] | None = None) -> str:
    """Runs a job that must succeed. Returns its main process's output."""
    codes = finish(start_job(arguments, log, world, before))
    texts = [log.with_name(f"{log.name}{rank}").read_text() for rank in range(world)]
    assert codes == [0] * world, "\n".join(texts)
    return texts[0]

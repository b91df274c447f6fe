"""The processes that share an evaluation: one, or as many as torchrun or accelerate started."""

from __future__ import annotations

from datetime import timedelta

from pvdm_fast.jobs.devices import claim_device
from pvdm_fast.jobs.processes import Processes

PATIENCE = timedelta(hours=6)  # how long a process that has finished waits for the others


def these_processes(device: str) -> Processes:
    """What the launcher started; ``device`` is "auto", "cpu", "cuda" or "cuda:N"."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    on_cpu = claim_device(device).type == "cpu"
    return Processes(Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]))


def wait(processes: Processes) -> None:
    """Returns when all processes have got here."""
    processes.gathered(None)

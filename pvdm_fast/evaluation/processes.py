"""The processes that share an evaluation: one, or as many as torchrun or accelerate started."""

from __future__ import annotations

from datetime import timedelta

import torch

from pvdm_fast.jobs.processes import Processes

PATIENCE = timedelta(hours=6)  # how long a process that has finished waits for the others


def these_processes(device: str) -> Processes:
    """The processes that the launcher started. ``device`` is "auto" (a GPU if there is one) or "cpu"."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    return Processes(Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]))


def wait(processes: Processes) -> None:
    """Returns when all processes have got here."""
    processes.gathered(None)

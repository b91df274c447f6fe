"""The processes that share an evaluation: one, or as many as torchrun or accelerate started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch

PATIENCE = timedelta(hours=6)  # how long a process that has finished its share waits for the others


@dataclass(frozen=True)
class Process:
    """This process: number ``rank`` of ``world``, computing on ``device``; ``wait`` returns when all have called it."""

    rank: int
    world: int
    device: torch.device
    wait: Callable[[], None]

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def this_process(device: str) -> Process:
    """What the launcher started this process as; ``device`` is "auto" (a GPU where there is one) or "cpu"."""
    from accelerate import PartialState

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    return Process(state.process_index, state.num_processes, torch.device(state.device), state.wait_for_everyone)

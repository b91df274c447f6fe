"""The processes of a job: what they agree on, and what the main one does for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.share import Share
from pvdm_fast.jobs.transfer import Reading

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

# How long a process waits for the others: longer than a checkpoint takes to write, or a batch to read.
TIMEOUT = timedelta(minutes=10)
POLL = 0.001  # seconds


class Processes:
    """All processes of a job call these methods in the same order. With a single process they need no communication."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.device = accelerator.device
        self.share = Share(accelerator.process_index, accelerator.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.share.rank == 0

    def means(self, values: Tensor) -> Reading:
        """Send the means of a few values (n,) over the processes to the host: one exchange and one copy.

        A mean is not finite where one of the processes' values is not.
        """
        mine = values.detach()
        if self.share.world == 1:
            return Reading(mine)
        parts = [torch.empty_like(mine) for _ in range(self.share.world)]
        dist.all_gather(parts, mine)
        return Reading(torch.stack(parts).sum(0) / self.share.world)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers. Signals are answered while the others don't come."""
        if self.share.world == 1:
            return number
        result = torch.tensor(number, device=self.device)
        work: Any = dist.all_reduce(result, dist.ReduceOp.MAX, async_op=True)
        while not work.is_completed():
            time.sleep(POLL)  # Python calls no handler of signals inside wait()
        work.wait()
        return int(result.item())

    def gathered(self, mine: T) -> list[T]:
        """What each process has, in the order of their ranks."""
        if self.share.world == 1:
            return [mine]
        everyone: list[Any] = [None] * self.share.world
        dist.all_gather_object(everyone, mine)
        return everyone

    def on_main(self, action: Callable[[], T]) -> T:
        """The result of ``action``, run by the main process while the others wait.

        Raises:
            UserError: what ``action`` raised, by `fail`.
        """
        if self.share.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            self.fail(outcome[1])
        return outcome[0]

    def fail(self, error: UserError) -> NoReturn:
        """End all processes with an error that all have met. The main one raises it, the others exit silently."""
        if self.main:
            raise error
        raise SystemExit(error.exit_code)


def lost_another(error: BaseException) -> bool:
    """Whether ``error`` is how NCCL's or Gloo's collectives fail when another process is gone, or doesn't answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))

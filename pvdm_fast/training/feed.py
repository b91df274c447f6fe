"""The batches of a step on the training device; on a GPU the next ones come while a step computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from pvdm_fast.errors import Interrupted, UserError
from pvdm_fast.jobs.interrupt import StopRequest

if TYPE_CHECKING:
    from pvdm_fast.data import Batch


class Feed:
    """Takes ``count`` batches a step from ``source``.

    Clips cross as they come from the workers, uint8, on a stream of their own.
    """

    def __init__(self, source: Iterator[Batch], count: int, device: torch.device, stop: StopRequest) -> None:
        self.source, self.count, self.device, self.stop = source, count, device, stop
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: list[Batch] | Exception | None = None

    def take(self) -> list[Batch]:
        """The batches of the next step.

        Raises:
            Interrupted: a signal came while they didn't; UserError: the data gave out.
        """
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, Exception):
            raise ahead
        batches = self._read() if ahead is None else ahead
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for batch in batches:
                batch["video"].record_stream(current)  # else its memory could be given away while it is in use
        return batches

    def read_ahead(self) -> None:
        """On a GPU: send the next step's batches on their way. What goes wrong is raised when they are taken."""
        if self._stream is None or self._ahead is not None:
            return
        try:
            self._ahead = self._read()
        except (Interrupted, UserError) as error:
            self._ahead = error

    def _read(self) -> list[Batch]:
        with self.stop.waiting():
            batches = [next(self.source) for _ in range(self.count)]
        if self._stream is None:
            return batches
        with torch.cuda.stream(self._stream):
            return [{**batch, "video": batch["video"].to(self.device, non_blocking=True)} for batch in batches]

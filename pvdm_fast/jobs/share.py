"""A process's part of each global batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Every ``world``-th clip of a global batch, from ``rank`` on. Without arguments, all of it.

    Random numbers are drawn for the global batch and then divided, so they don't depend on the number of processes.
    """

    rank: int = 0
    world: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """The rows (world * B, ...) of a global batch that belong to this process: (B, ...)."""
        return whole[self.rank :: self.world]

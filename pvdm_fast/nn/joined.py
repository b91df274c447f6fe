"""Weights of several layers in one tensor, so that one product takes them all: joined in each pass, or kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.nn import copies

# A pass has two, weights and biases. A change of what is joined leaves the old ones behind: not more than these.
MOST = 16


class Joined:
    """torch.cat(weights), in memory that stays where it is as long as this is there."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = tuple(weights)  # held, so that no other tensor can take the identity of one of them
        self.tensor = torch.cat(self.weights)
        self._state = self._state_now()

    def _state_now(self) -> list[Any]:
        return [(weight._version, weight.dtype, weight.device) for weight in self.weights]

    def is_current(self) -> bool:
        return self._state == self._state_now()

    def renew(self) -> None:
        """Join the weights as they are now, in the same memory."""
        torch.cat(self.weights, out=self.tensor)
        self._state = self._state_now()


_read: ContextVar[list[Joined] | None] = ContextVar("joined_read", default=None)


def join(weights: Sequence[Tensor]) -> Tensor:
    """torch.cat(weights). Don't write into it: inside `copies.kept`, without a gradient, the next passes get it too."""
    store = None if torch.compiler.is_compiling() or torch.is_grad_enabled() else copies.kept_now()
    if store is None:
        return torch.cat(list(weights))
    read = _read.get()
    capturing = weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
    key = tuple(map(id, weights))
    found: Joined | None = store.joined.get(key)
    if found is None or not found.is_current():
        if not all(map(copies.can_be_kept, weights)):
            return torch.cat(list(weights))
        if len(store.joined) >= MOST:
            store.joined.clear()
        found = store.joined[key] = Joined(weights)
    if read is not None:
        read.append(found)
    elif capturing:  # by somebody who doesn't know that it would have to be renewed
        return torch.cat(list(weights))
    return found.tensor


@contextmanager
def read_by_a_graph() -> Iterator[list[Joined]]:
    """While a CUDA graph is captured: it reads what was joined before, which the list will hold. `renew` it before each
    replay."""
    found: list[Joined] = []
    token = _read.set(found)
    try:
        yield found
    finally:
        _read.reset(token)


def renew(read: Iterable[Joined]) -> None:
    """Make what a graph reads current: where a weight has changed, and once in each `copies.kept`."""
    store = copies.kept_now()
    for one in read:
        key = tuple(map(id, one.weights))
        if store is None or store.joined.get(key) is not one or not one.is_current():
            one.renew()
        if store is not None:
            store.joined[key] = one

"""Measures memory: what a graph saves for its backward pass, and what is alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from pvdm_fast.analysis.recorder import Recorder


def saved_bytes(run: Callable[[], Sequence[Tensor]], parameters: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that the graph of `run()` keeps for its backward pass, without parameters.

    The inputs that a checkpointed function keeps are counted too. Works in a FakeTensorMode.
    """
    excluded = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            kept[storage._cdata] = storage  # kept alive, so that no other storage can take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


class LiveMemory(Recorder):
    """Counts the bytes of all storages that operations allocate while it is active: `now`, and the maximum, `peak`.

    Scratch memory inside kernels isn't seen. In a FakeTensorMode nothing is allocated, so you can measure what would
    not fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        given = {t.untyped_storage()._cdata for t in tree_iter((arguments, options)) if isinstance(t, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._count(storage)

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

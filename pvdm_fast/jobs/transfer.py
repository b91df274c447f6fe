"""Tensors between the CPU and a GPU without waiting: draws in one copy, results in one copy that is read later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: kernels read packs of 16


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Small CPU tensors on `device`: on a GPU by one copy from pinned memory, which nobody waits for.

    One by one each would be a copy from pageable memory, at which PyTorch waits for all that the GPU has to do.
    """
    if device.type == "cpu" or not tensors:
        return list(tensors)
    return unpack(pack(tensors, pinned=True).to(device, non_blocking=True), tensors)


def pack(tensors: Sequence[Tensor], pinned: bool = False) -> Tensor:
    """The bytes of all tensors in one, each at a multiple of ALIGNMENT."""
    packed = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for part, tensor in zip(unpack(packed, tensors), tensors, strict=True):
        part.copy_(tensor)
    return packed


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views into what `pack` made of tensors `like` these."""
    views, start = [], 0
    for tensor in like:
        views.append(packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _room(tensor)
    return views


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


class Reading:
    """The values of a tensor on their way to the host, copied as soon as they are there; `values` waits."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.detach().to("cpu", non_blocking=True)  # into pinned memory
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def values(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        found: list[float] = self._host.tolist()
        return found

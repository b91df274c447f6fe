"""Brings tensors of any strides into the form that kernels read.

The bindings check the same and raise, so a launcher that forgets one of these can't read past a tensor's memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows_dense(x: Tensor) -> Tensor:
    """`x` itself if its last axis is dense, else a contiguous copy. Kernels take any other strides, zero included."""
    # Asked in the order of what is most frequent: a shape takes 0.1 us to make.
    return x if x.is_contiguous() or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def parameter(x: Tensor) -> Tensor:
    """A parameter or statistic as kernels read it: float32, contiguous."""
    # Asking takes half as long as `x.float().contiguous()`, which also returns x.
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


def empty_as(x: Tensor) -> Tensor:
    """Contiguous memory in the shape and dtype of `x`; `x.new_empty(x.shape)` takes twice as long, 1.7 µs."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def order_of(weight: Tensor) -> torch.memory_format:
    """In which order of memory the gradient of a convolution's weight (C', C, 3, 3) comes: channels_last if the weight
    has it, else contiguous."""
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes 0.7 µs where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def matrix(x: Tensor) -> Tensor:
    """A matrix as the vendor's products take it: `x` itself, or a contiguous copy.

    `x` itself needs dense rows or dense columns that don't overlap. oneDNN raises on other weights.
    """
    (rows, columns), (row, column) = x.shape, x.stride()
    whole = (column == 1 and row >= max(columns, 1)) or (row == 1 and column >= max(rows, 1))
    return x if whole else x.contiguous()


def vector(x: Tensor) -> Tensor:
    """A vector as the vendor's products take it: contiguous, because they ignore its stride."""
    return x.contiguous()

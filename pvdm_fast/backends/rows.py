"""Brings tensors of any strides into the form that kernels read.

The bindings check the same and raise, so a launcher that forgets one of these can't read past a tensor's memory.
"""

from __future__ import annotations

from torch import Tensor


def rows_dense(x: Tensor) -> Tensor:
    """`x` itself if its last axis is dense, otherwise a contiguous copy. Kernels take any other strides,
    including zero."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def parameter(x: Tensor) -> Tensor:
    """A parameter or statistic as kernels read it: float32, contiguous."""
    return x.float().contiguous()


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

"""Launchers of the C++ kernels: they allocate outputs, and `pvdm_fast._cpu` fills them. One file per operation."""

from __future__ import annotations

from torch import Tensor

from pvdm_fast.backends.rows import rows_dense


def rows_of(x: Tensor) -> Tensor:
    """(..., C) as (rows, C) with a dense last axis: a view if strides allow it, otherwise a contiguous copy."""
    return rows_dense(x.reshape(-1, x.shape[-1]))


def kernel_rows(x: Tensor) -> Tensor:
    """(..., C) as the kernels of rows take it: `x` itself where it is contiguous, which saves the 1 µs of a reshape."""
    return x if x.is_contiguous() else rows_of(x)

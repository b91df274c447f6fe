"""Launchers of the C++ kernels: they allocate outputs, and `pvdm_fast._cpu` fills them. One file per operation."""

from __future__ import annotations

from torch import Tensor

from pvdm_fast.backends.rows import rows_dense


def rows_of(x: Tensor) -> Tensor:
    """(..., C) as (rows, C) with a dense last axis: a view if strides allow it, otherwise a contiguous copy."""
    return rows_dense(x.reshape(-1, x.shape[-1]))

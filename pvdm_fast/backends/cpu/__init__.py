"""Launchers of the C++ kernels: outputs are made here, `pvdm_fast._cpu` fills them. One file an operation."""

from __future__ import annotations

from torch import Tensor

from pvdm_fast.backends.rows import rows_dense


def rows_of(x: Tensor) -> Tensor:
    """(..., C) as (rows, C), last axis dense: a view where its strides allow it, else a contiguous copy."""
    return rows_dense(x.reshape(-1, x.shape[-1]))

"""Launchers of the C++ kernels: outputs are made here, `pvdm_fast._cpu` fills them. One file an operation."""

from __future__ import annotations

from torch import Tensor


def rows_dense(x: Tensor) -> Tensor:
    """`x` itself if its last axis is dense, else a contiguous copy. Other strides, zero included, are the kernels' work."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def parameter(x: Tensor) -> Tensor:
    """A weight as the kernels read it: float32, last axis dense."""
    return rows_dense(x.float())

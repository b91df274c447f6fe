"""`triplane_slice` on the CPU: one pass gathers sequences, adds token and positions. The gradient is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import as_dtype, parameter, rows_dense
from pvdm_fast.layout import PLANE_NAMES


def forward(x: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int) -> Tensor:
    """x: (B, T H W, C), token: (C), positions: (L + 1, C) -> (B, sites, L + 1, C)."""
    length = len(positions)
    out = x.new_empty(x.shape[0], x.shape[1] // (length - 1), length, x.shape[2])
    where = (PLANE_NAMES.index(plane), time, height, width)
    extension("_cpu").triplane_slice_forward(
        rows_dense(x), parameter(token), parameter(positions), out, *where, torch.get_num_threads()
    )
    return out


def backward(
    grad: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, token and positions from grad: (B, sites, L + 1, C)."""
    dx = grad.new_empty(grad.shape[0], time * height * width, grad.shape[3])
    dpositions = torch.empty(positions.shape, dtype=torch.float32)
    where = (PLANE_NAMES.index(plane), time, height, width)
    extension("_cpu").triplane_slice_backward(rows_dense(grad), dx, dpositions, *where, torch.get_num_threads())
    return dx, dpositions[-1].to(token.dtype, copy=True), as_dtype(dpositions, positions.dtype)

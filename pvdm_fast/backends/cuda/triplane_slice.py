"""`triplane_slice` on a GPU: one pass gathers sequences, adds token and positions. The gradient is read once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends.cuda import launch_refusal, launch_target
from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import parameter, rows_dense
from pvdm_fast.layout import PLANE_NAMES


def refusal(*inputs: Any) -> str | None:
    """Why these arguments (of either direction, ending in the sizes) are too large, or None."""
    *_, time, height, width = inputs
    # A sequence is one token longer than its axis.
    return launch_refusal(2 * inputs[0].shape[0] * time * height * width, inputs[0].shape[-1])


def forward(x: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int) -> Tensor:
    """x: (B, T H W, C), token: (C), positions: (L + 1, C) -> (B, sites, L + 1, C)."""
    length = len(positions)
    out = x.new_empty(x.shape[0], x.shape[1] // (length - 1), length, x.shape[2])
    where = (PLANE_NAMES.index(plane), time, height, width)
    extension("_cuda").triplane_slice_forward(
        rows_dense(x), parameter(token), parameter(positions), out, *where, *launch_target(x)
    )
    return out


def backward(
    grad: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, token and positions from grad: (B, sites, L + 1, C)."""
    dx = grad.new_empty(grad.shape[0], time * height * width, grad.shape[3])
    dpositions = torch.empty(positions.shape, dtype=torch.float32, device=grad.device)
    where = (PLANE_NAMES.index(plane), time, height, width)
    size = extension("_cuda").triplane_slice_workspace(grad.shape[0], grad.shape[3], *where)
    workspace = torch.empty(size, dtype=torch.float32, device=grad.device)
    extension("_cuda").triplane_slice_backward(
        rows_dense(grad), dx, dpositions, workspace, *where, *launch_target(grad)
    )
    return dx, dpositions[-1].to(token.dtype, copy=True), dpositions.to(positions.dtype)

"""Gather one axis of a lattice as sequences, append a learned token, add learned positions."""

from __future__ import annotations

import torch
from torch import Tensor

# The axis of (B, T, H, W, C) that each plane collapses: its sequences run along it.
COLLAPSED_AXIS = {"xy": 1, "yt": 2, "xt": 3}


def _axis(plane: str) -> int:
    return COLLAPSED_AXIS[plane]


def forward(x: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int) -> Tensor:
    """x: (B, T H W, C), token: (C), positions: (L + 1, C) -> (B, sites, L + 1, C), L the collapsed axis's length."""
    lattice = x.unflatten(1, (time, height, width)).movedim(_axis(plane), 3)  # (B, p, q, L, C)
    sequences = lattice.flatten(1, 2)
    end = token.to(x.dtype).expand(*sequences.shape[:2], 1, -1)
    return torch.cat((sequences, end), dim=2) + positions.to(x.dtype)


def backward(
    grad: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, token and positions from grad: (B, sites, L + 1, C)."""
    kept = [size for axis, size in enumerate((time, height, width), start=1) if axis != _axis(plane)]
    lattice = grad[:, :, :-1].unflatten(1, kept).movedim(3, _axis(plane))
    wide_grad = grad if grad.dtype == torch.float64 else grad.float()
    dpositions = wide_grad.sum((0, 1))
    dx = lattice.flatten(1, 3).contiguous()
    return dx, dpositions[-1].to(token.dtype, copy=True), dpositions.to(positions.dtype)

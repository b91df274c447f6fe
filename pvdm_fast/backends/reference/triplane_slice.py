"""Gather one axis of a lattice as sequences, append a learned token, add learned positions."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

# A lattice's tokens, and the sequences that each plane reads. Sites are in the order of the plane's packed tokens.
LATTICE = "b (t h w) c"
SEQUENCES = {"xy": "b (h w) t c", "yt": "b (t w) h c", "xt": "b (t h) w c"}


def forward(x: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int) -> Tensor:
    """x: (B, T H W, C), token: (C), positions: (L + 1, C) -> (B, sites, L + 1, C). L is the length of the
    collapsed axis."""
    sequences = rearrange(x, f"{LATTICE} -> {SEQUENCES[plane]}", t=time, h=height, w=width)
    end = token.to(x.dtype).expand(*sequences.shape[:2], 1, -1)
    return torch.cat((sequences, end), dim=2) + positions.to(x.dtype)


def backward(
    grad: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, token and positions from grad: (B, sites, L + 1, C)."""
    sizes = dict(t=time, h=height, w=width)
    dx = rearrange(grad[:, :, :-1], f"{SEQUENCES[plane]} -> {LATTICE}", **sizes).contiguous()
    wide_grad = grad if grad.dtype == torch.float64 else grad.float()
    dpositions = wide_grad.sum((0, 1))
    return dx, dpositions[-1].to(token.dtype, copy=True), dpositions.to(positions.dtype)

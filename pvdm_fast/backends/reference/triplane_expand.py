"""From three planes back to a lattice: the broadcast sum of a 1 x 1 convolution of each (PVDM, section 3.1)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from pvdm_fast.backends.reference import wide
from pvdm_fast.layout import TriplaneLayout


def forward(planes: Tensor, weight: Tensor, bias: Tensor, time: int, height: int, width: int) -> Tensor:
    """planes: (B, N, D), weight: (3, C, D) and bias: (3, C) in packed order -> (B, T H W, C)."""
    layout = TriplaneLayout(time, height, width)
    packed, weight, bias = wide(planes, weight, bias)
    xy, yt, xt = (plane @ w.mT + b for plane, w, b in zip(layout.split(packed), weight, bias, strict=True))
    lattice = (
        rearrange(xy, "b h w c -> b 1 h w c")
        + rearrange(yt, "b t w c -> b t 1 w c")
        + rearrange(xt, "b t h c -> b t h 1 c")
    )
    return rearrange(lattice, "b t h w c -> b (t h w) c").to(planes.dtype)


def backward(
    grad: Tensor, planes: Tensor, weight: Tensor, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of planes, weight and bias from grad: (B, T H W, C)."""
    layout = TriplaneLayout(time, height, width)
    packed, g, w = wide(planes, grad, weight)
    lattice = rearrange(g, "b (t h w) c -> b t h w c", t=time, h=height, w=width)
    sums = [lattice.sum(axis) for axis in (1, 2, 3)]  # over time for xy, height for yt, width for xt
    dplanes = torch.cat([(s @ wp).flatten(1, 2) for s, wp in zip(sums, w, strict=True)], dim=1)
    dweight = torch.stack(
        [torch.einsum("bijc,bijd->cd", s, p) for s, p in zip(sums, layout.split(packed), strict=True)]
    )
    dbias = torch.stack([s.sum((0, 1, 2)) for s in sums])
    return dplanes.to(planes.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)

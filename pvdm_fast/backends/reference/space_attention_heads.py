"""The heads of space attention in a TimeSformer layer: LayerNorm, qkv, attention inside frames."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.reference import axial_attention, wide


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    sin: Tensor,
    cos: Tensor,
    sites: int,
    heads: int,
    eps: float,
) -> Tensor:
    """x: (B, T sites, C) -> (B, T sites, inner)."""
    x_, gain, shift, qkv_w = wide(x, norm_weight, norm_bias, qkv_weight)
    qkv = F.linear(F.layer_norm(x_, x.shape[-1:], gain, shift, eps), qkv_w)
    lattice = qkv.unflatten(1, (-1, sites, 1)).unflatten(-1, (3, heads, -1))
    attended, _ = axial_attention.forward(lattice, None, sin, cos, "space", lattice.shape[-1] ** -0.5)
    return attended.flatten(4).flatten(1, 3).to(x.dtype).contiguous()

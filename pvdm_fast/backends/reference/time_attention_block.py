"""The time attention of a TimeSformer layer: LayerNorm, qkv, attention along time, output product, residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.reference import axial_attention, wide


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    sin: Tensor,
    cos: Tensor,
    time: int,
    heads: int,
    eps: float,
) -> Tensor:
    """x: (B, T sites, C) -> (B, T sites, C)."""
    x_, gain, shift, qkv_w, out_w, out_b = wide(x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias)
    head = out_weight.shape[1] // heads
    qkv = F.linear(F.layer_norm(x_, x.shape[-1:], gain, shift, eps), qkv_w)
    lattice = qkv.unflatten(1, (time, -1, 1)).unflatten(-1, (3, heads, head))
    attended, _ = axial_attention.forward(lattice, None, sin, cos, "time", head**-0.5)
    total = x_ + F.linear(attended.flatten(4).flatten(1, 3), out_w, out_b)
    return total.to(x.dtype).contiguous()

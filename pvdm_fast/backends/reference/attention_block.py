"""PVDM's cross-plane attention block: GroupNorm, qkv, attention over all tokens, output projection, residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.reference import segment_attention, wide


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    heads: int,
    groups: int,
    eps: float,
) -> Tensor:
    """x: (B, N, C) -> (B, N, C)."""
    x_, gain, shift, qkv_w, qkv_b, proj_w, proj_b = wide(
        x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias
    )
    batch, tokens, channels = x.shape
    normed = F.group_norm(x_.transpose(1, 2), groups, gain, shift, eps).transpose(1, 2)
    qkv = F.linear(normed, qkv_w, qkv_b).view(batch, tokens, heads, 3, channels // heads).transpose(2, 3)
    attended, _ = segment_attention.forward(qkv, [0, tokens], (channels // heads) ** -0.5)
    return (x_ + F.linear(attended.flatten(2), proj_w, proj_b)).to(x.dtype).contiguous()

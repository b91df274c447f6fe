"""PVDM's attention blocks: GroupNorm, qkv, attention across planes or inside each, output projection, residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.reference import plane_norm, segment_attention, wide
from pvdm_fast.layout import PlaneLayout


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
    planes: Sequence[int],
) -> Tensor:
    """x: (B, N, C) -> (B, N, C). Tokens of one of `planes` share statistics, and attend to each other."""
    x_, gain, shift, qkv_w, qkv_b, proj_w, proj_b = wide(
        x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias
    )
    batch, tokens, channels = x.shape
    normed, _, _ = plane_norm.forward(x_, gain, shift, None, planes, groups, eps, False, 0)
    qkv = F.linear(normed, qkv_w, qkv_b).view(batch, tokens, heads, 3, channels // heads).transpose(2, 3)
    attended, _ = segment_attention.forward(qkv, PlaneLayout.from_sizes(planes).offsets, (channels // heads) ** -0.5)
    return (x_ + F.linear(attended.flatten(2), proj_w, proj_b)).to(x.dtype).contiguous()

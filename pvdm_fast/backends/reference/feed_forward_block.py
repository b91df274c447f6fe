"""What follows the heads in a TimeSformer layer: product, residual, LayerNorm, gated feed-forward, residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.reference import geglu, wide


def forward(
    x: Tensor,
    attended: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    eps: float,
) -> Tensor:
    """x: (B, N, C), attended: (B, N, inner) -> (B, N, C)."""
    x_, attended, out_w, out_b, gain, shift, up_w, up_b, down_w, down_b = wide(
        x, attended, out_weight, out_bias, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias
    )
    total = x_ + F.linear(attended, out_w, out_b)
    normed = F.layer_norm(total, total.shape[-1:], gain, shift, eps)
    hidden = geglu.forward(F.linear(normed, up_w, up_b))
    return (total + F.linear(hidden, down_w, down_b)).to(x.dtype).contiguous()

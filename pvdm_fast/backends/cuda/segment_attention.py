"""`segment_attention` on a GPU, flash-style in CUDA C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pvdm_fast.backends.cuda import attention
from pvdm_fast.backends.cuda.attention import refusal as refusal


def forward(qkv: Tensor, offsets: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """qkv: (B, N, 3, heads, d) -> out: (B, N, heads, d), log-sum-exp of the scores: (B, heads, N) float32."""
    batch, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, width)
    lse = attention.forward(qkv.unsqueeze(1), None, (None, None), out.unsqueeze(1), offsets, scale)
    return out, lse.squeeze(1)


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Sequence[int], scale: float) -> Tensor:
    """The gradient of `qkv`, with its shape and memory order."""
    dqkv = torch.empty_like(qkv)
    attention.backward(
        *(grad.unsqueeze(1), qkv.unsqueeze(1), None, (None, None), out.unsqueeze(1), lse.unsqueeze(1)),
        *(dqkv.unsqueeze(1), None, offsets, scale),
    )
    return dqkv

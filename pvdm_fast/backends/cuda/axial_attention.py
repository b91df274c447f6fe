"""`axial_attention` on a GPU. An axis is a pair of strides, so nothing is rearranged."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.backends.cuda import attention
from pvdm_fast.backends.cuda.attention import refusal as refusal
from pvdm_fast.backends.sequences import sequences_of, sequences_to_fill


def forward(
    qkv: Tensor, query: Tensor | None, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float
) -> tuple[Tensor, Tensor]:
    """qkv: (B, T, H, W, 3, heads, d), or with query (B, 1, H, W, heads, d) given (B, T, H, W, 2, heads, d)
    -> out: (B, T or 1, H, W, heads, d), log-sum-exp: (B, sites, heads, queries) float32."""
    sequences = sequences_of(qkv, axis)
    heads, width = qkv.shape[5:]
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] if query is None else 1, *qkv.shape[2:4], heads, width)
    single = None if query is None else sequences_of(query, axis)
    offsets = [0, sequences.shape[2]]
    return out, attention.forward(sequences, single, (sin, cos), sequences_of(out, axis), offsets, scale)


def backward(
    grad: Tensor,
    qkv: Tensor,
    query: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    out: Tensor,
    lse: Tensor,
    axis: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `qkv` (with its shape and memory order) and of `query` (empty if there is none)."""
    sequences = sequences_of(qkv, axis)
    dqkv = torch.empty_like(qkv)
    filled, dsequences = sequences_to_fill(dqkv, axis)
    dquery = qkv.new_empty(0) if query is None else torch.empty_like(query, memory_format=torch.contiguous_format)
    attention.backward(
        *(sequences_of(grad, axis), sequences, None if query is None else sequences_of(query, axis), (sin, cos)),
        *(sequences_of(out, axis), lse, dsequences, None if query is None else sequences_of(dquery, axis)),
        *([0, sequences.shape[2]], scale),
    )
    return dqkv if filled is dqkv else dqkv.copy_(filled), dquery

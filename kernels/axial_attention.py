"""`axial_attention` in Triton, forward and backward. The numbers of queries and tokens choose between three variants.

- axial_attention_query.py: one query per sequence.
- axial_attention_short.py: sequences of up to 64 tokens that fit a program's registers. One launch forward, one
  backward.
- axial_attention_long.py: longer ones. One launch forward, two backward, and one more each for the rotation.

An axis is a pair of strides, so nothing is rearranged. There are no atomics, so results are the same on every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends.sequences import sequences_of, sequences_to_fill
from pvdm_fast.kernels import axial_attention_long as long
from pvdm_fast.kernels import axial_attention_long_backward as long_backward
from pvdm_fast.kernels import axial_attention_query as single
from pvdm_fast.kernels import axial_attention_short as short
from pvdm_fast.kernels.attention_common import refuse_width


def refusal(*inputs: Any) -> str | None:
    """Why the kernels don't take these arguments (of either direction, a tensor of heads first), or None."""
    return refuse_width(inputs[0].shape[-1])


def _tables(sin: Tensor | None, cos: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if sin is None or cos is None else (sin.float().contiguous(), cos.float().contiguous())


def forward(
    qkv: Tensor, query: Tensor | None, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float
) -> tuple[Tensor, Tensor]:
    """qkv: (B, T, H, W, 3, heads, d), or with query (B, 1, H, W, heads, d) given (B, T, H, W, 2, heads, d)
    -> out: (B, T or 1, H, W, heads, d), log-sum-exp: (B, positions, heads, queries) float32."""
    sequences = sequences_of(qkv, axis)
    batch, sites, length, _, heads, width = sequences.shape
    time, queries = (qkv.shape[1], length) if query is None else (1, 1)
    out = torch.empty((batch, time, *qkv.shape[2:4], heads, width), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, sites, heads, queries), dtype=torch.float32, device=qkv.device)
    filled = sequences_of(out, axis)
    if query is not None:
        single.forward(sequences_of(query, axis), sequences, filled, lse, scale)
    elif short.serves(length, width, qkv.dtype):
        short.forward(sequences, *_tables(sin, cos), filled, lse, scale)
    else:
        long.forward(sequences, *_tables(sin, cos), filled, lse, scale)
    return out, lse


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
    """Gradients of `qkv` (in its shape and memory order) and of `query` (empty where there is none)."""
    incoming, sequences, outputs = sequences_of(grad, axis), sequences_of(qkv, axis), sequences_of(out, axis)
    lse = lse.contiguous()
    dqkv = torch.empty_like(qkv)
    filled, dsequences = sequences_to_fill(dqkv, axis)
    if query is not None:
        dquery = torch.empty_like(query, memory_format=torch.contiguous_format)
        single.backward(
            *(incoming, sequences_of(query, axis), sequences, outputs, lse),
            *(sequences_of(dquery, axis), dsequences, scale),
        )
    else:
        dquery = qkv.new_empty(0)
        if short.serves(sequences.shape[2], qkv.shape[-1], qkv.dtype):
            short.backward(incoming, sequences, *_tables(sin, cos), lse, dsequences, scale)
        else:
            long_backward.backward(incoming, sequences, *_tables(sin, cos), outputs, lse, dsequences, scale)
    return dqkv if filled is dqkv else dqkv.copy_(filled), dquery

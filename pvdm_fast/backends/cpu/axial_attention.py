"""`axial_attention` on the CPU, forward and backward. An axis is a pair of strides, so nothing is rearranged."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import parameter, rows_dense
from pvdm_fast.backends.sequences import sequences_of, sequences_to_fill


def _tables(sin: Tensor | None, cos: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if sin is None or cos is None else (parameter(sin), parameter(cos))


def forward(
    qkv: Tensor, query: Tensor | None, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float
) -> tuple[Tensor, Tensor]:
    """qkv: (B, T, H, W, 3, heads, d), or with query (B, 1, H, W, heads, d) given (B, T, H, W, 2, heads, d)
    -> out: (B, T or 1, H, W, heads, d), log-sum-exp: (B, positions, heads, queries) float32."""
    sequences = sequences_of(qkv, axis)
    batch, sites, length, _, heads, width = sequences.shape
    queries = length if query is None else 1
    time = qkv.shape[1] if query is None else 1
    out = torch.empty(qkv.shape[0], time, *qkv.shape[2:4], heads, width, dtype=qkv.dtype)
    lse = torch.empty(batch, sites, heads, queries, dtype=torch.float32)
    extension("_cpu").attention_forward(
        sequences,
        None if query is None else sequences_of(query, axis),
        *_tables(sin, cos),
        sequences_of(out, axis),
        lse,
        *([0, length], scale, torch.get_num_threads()),
    )
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
    """Gradients of `qkv` (with its shape and memory order) and of `query` (empty if there is none)."""
    sequences = sequences_of(qkv, axis)
    dqkv = torch.empty_like(qkv)
    filled, dsequences = sequences_to_fill(dqkv, axis)
    dquery = qkv.new_empty(0) if query is None else torch.empty_like(query, memory_format=torch.contiguous_format)
    extension("_cpu").attention_backward(
        sequences_of(grad, axis),
        sequences,
        None if query is None else sequences_of(query, axis),
        *_tables(sin, cos),
        sequences_of(out, axis),
        rows_dense(lse),
        dsequences,
        None if query is None else sequences_of(dquery, axis),
        *([0, sequences.shape[2]], scale, torch.get_num_threads()),
    )
    return dqkv if filled is dqkv else dqkv.copy_(filled), dquery


def jvp(
    qkv: Tensor, tangent: Tensor, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `forward` without a query, and the tangent of the first from that of `qkv`. Memory is O(N)."""
    sequences = sequences_of(qkv, axis)
    batch, sites, length, _, heads, width = sequences.shape
    out = torch.empty(*qkv.shape[:4], heads, width, dtype=qkv.dtype)
    dout, lse = torch.empty_like(out), torch.empty(batch, sites, heads, length, dtype=torch.float32)
    extension("_cpu").attention_jvp(
        sequences,
        sequences_of(tangent.to(qkv.dtype), axis),
        *_tables(sin, cos),
        sequences_of(out, axis),
        lse,
        sequences_of(dout, axis),
        *([0, length], scale, torch.get_num_threads()),
    )
    return out, lse, dout

"""Softmax attention inside segments of a token axis (PVDM's cross-plane and in-plane attention)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from pvdm_fast.backends.reference import in_order_of, softmax, wide


def _segments(qkv: Tensor, offsets: Sequence[int]) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(where, q, k, v) of each segment; q, k, v: (B, heads, tokens, d)."""
    (wide_qkv,) = wide(qkv)
    for start, stop in pairwise(offsets):
        q, k, v = rearrange(wide_qkv[:, start:stop], "b n parts heads d -> parts b heads n d")
        yield slice(start, stop), q, k, v


def _pack(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """(B, heads, tokens, d) of each segment -> (B, N, heads, d)."""
    return rearrange(torch.cat(parts, dim=2), "b heads n d -> b n heads d").to(dtype).contiguous()


def forward(qkv: Tensor, offsets: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """qkv: (B, N, 3, heads, d) -> out: (B, N, heads, d), log-sum-exp of the scores: (B, heads, N), float32 at least."""
    outs, logs = [], []
    for _, q, k, v in _segments(qkv, offsets):
        scores = scale * q @ k.mT
        outs.append(softmax(scores) @ v)
        logs.append(scores.logsumexp(-1))
    return _pack(outs, qkv.dtype), torch.cat(logs, dim=-1)


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Sequence[int], scale: float) -> Tensor:
    """Gradient of `qkv`, with its shape and memory order. With P = softmax(S) and D = rowsum(dO . O):
    dV = P'dO, dS = P . (dO V' - D), dQ = scale dS K, dK = scale dS'Q.
    """
    parts = []
    for where, q, k, v in _segments(qkv, offsets):
        g, o = (t[:, where].transpose(1, 2) for t in wide(grad, out))
        p = softmax(scale * q @ k.mT)
        ds = scale * p * (g @ v.mT - (g * o).sum(-1, keepdim=True))
        parts.append(torch.stack((ds @ k, ds.mT @ q, p.mT @ g)))
    dqkv = rearrange(torch.cat(parts, dim=3), "parts b heads n d -> b n parts heads d")
    return in_order_of(dqkv.to(qkv.dtype), qkv)


def backward_of_inputs(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Sequence[int], scale: float
) -> Tensor:
    return backward(grad, qkv, *forward(wide(qkv)[0], offsets, scale), offsets, scale)


def jvp(qkv: Tensor, tangent: Tensor, offsets: Sequence[int], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `forward`, and the tangent of the first from that of `qkv`.

    With a dot for tangents and <.> for means by P: S. = scale (Q. K' + Q K.'), O. = P . (S. - <S.>) V + P V..
    """
    outs, logs, tangents = [], [], []
    for (_, q, k, v), (_, dq, dk, dv) in zip(_segments(qkv, offsets), _segments(tangent, offsets), strict=True):
        scores, change = scale * q @ k.mT, scale * (dq @ k.mT + q @ dk.mT)
        p = softmax(scores)
        outs.append(p @ v)
        logs.append(scores.logsumexp(-1))
        tangents.append((p * (change - (p * change).sum(-1, keepdim=True))) @ v + p @ dv)
    return _pack(outs, qkv.dtype), torch.cat(logs, dim=-1), _pack(tangents, qkv.dtype)

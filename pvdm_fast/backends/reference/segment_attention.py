"""Softmax attention inside segments of a token axis (PVDM's cross-plane and in-plane attention)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pvdm_fast.backends.reference import wide


def _segments(qkv: Tensor, offsets: Sequence[int]) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(where, q, k, v) of each segment; q, k, v: (B, heads, tokens, d)."""
    (wide_qkv,) = wide(qkv)
    for start, stop in pairwise(offsets):
        q, k, v = wide_qkv[:, start:stop].permute(2, 0, 3, 1, 4).unbind(0)
        yield slice(start, stop), q, k, v


def forward(qkv: Tensor, offsets: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """qkv: (B, N, 3, heads, d) -> out: (B, N, heads, d), log-sum-exp of the scores: (B, heads, N) float32."""
    batch, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, width)
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    for where, q, k, v in _segments(qkv, offsets):
        scores = scale * q @ k.mT
        out[:, where] = (scores.softmax(-1) @ v).transpose(1, 2).to(out.dtype)
        lse[..., where] = scores.logsumexp(-1).to(lse.dtype)
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Sequence[int], scale: float) -> Tensor:
    """Gradient of `qkv`, in its shape and memory order. With P = softmax(S) and D = rowsum(dO . O):
    dV = P'dO, dS = P . (dO V' - D), dQ = scale dS K, dK = scale dS'Q."""
    dqkv = torch.empty_like(qkv)
    for where, q, k, v in _segments(qkv, offsets):
        g, o = (t[:, where].transpose(1, 2) for t in wide(grad, out))
        p = (scale * q @ k.mT).softmax(-1)
        ds = scale * p * (g @ v.mT - (g * o).sum(-1, keepdim=True))
        gradients = torch.stack((ds @ k, ds.mT @ q, p.mT @ g))  # (3, B, heads, tokens, d)
        dqkv[:, where] = gradients.permute(1, 3, 0, 2, 4).to(dqkv.dtype)
    return dqkv

"""Attention along one axis of a lattice, with PVDM's table rotation of queries and keys.

A lattice is (B, T, H, W). Axis "time": a sequence is the T tokens of one site. Axis "space": the H W tokens of one
frame. With `query` given, each sequence has that single query, and `qkv` holds keys and values only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.backends.reference import wide


def rotate_pairs(x: Tensor) -> Tensor:
    """Each neighbouring pair (a, b) of the last axis becomes (-b, a)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), dim=-1).flatten(-2)


def rotate_pairs_transposed(x: Tensor) -> Tensor:
    """The transpose of `rotate_pairs`: each pair (a, b) becomes (b, -a)."""
    return -rotate_pairs(x)


def to_sequences(x: Tensor, axis: str) -> Tensor:
    """(B, T, H, W, *, heads, d) -> (*, B, positions, heads, length, d) for axis "time" or "space"."""
    extra = x.dim() - 6
    if axis == "time":
        x = x.flatten(2, 3).movedim(1, 2)  # (B, HW, T, *, heads, d)
    else:
        x = x.flatten(2, 3)  # (B, T, HW, *, heads, d)
    x = x.movedim(2, -2)  # (B, positions, *, heads, length, d)
    return x.movedim(2, 0) if extra else x


def from_sequences(x: Tensor, axis: str, height: int, width: int) -> Tensor:
    """The inverse of `to_sequences`."""
    extra = x.dim() - 5
    if extra:
        x = x.movedim(0, 2)
    x = x.movedim(-2, 2)
    if axis == "time":
        x = x.movedim(2, 1)
    return x.unflatten(2, (height, width))


def _rotate(x: Tensor, sin: Tensor | None, cos: Tensor | None) -> Tensor:
    if sin is None or cos is None:
        return x
    return x * cos.to(x.dtype) + rotate_pairs(x) * sin.to(x.dtype)


def _unrotate(grad: Tensor, sin: Tensor | None, cos: Tensor | None) -> Tensor:
    """The gradient of `_rotate`'s input from that of its output."""
    if sin is None or cos is None:
        return grad
    return grad * cos.to(grad.dtype) + rotate_pairs_transposed(grad * sin.to(grad.dtype))


def _unpack(
    qkv: Tensor, query: Tensor | None, sin: Tensor | None, cos: Tensor | None, axis: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q, k and plain v: (B, positions, heads, length, d)."""
    (packed,) = wide(qkv)
    sequences = to_sequences(packed, axis)
    if query is not None:
        k, v = sequences.unbind(0)
        return to_sequences(query.to(k.dtype), axis), k, v
    q, k, v = sequences.unbind(0)
    return _rotate(q, sin, cos), _rotate(k, sin, cos), v


def forward(
    qkv: Tensor, query: Tensor | None, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float
) -> tuple[Tensor, Tensor]:
    """qkv: (B, T, H, W, 3, heads, d), or with query (B, 1, H, W, heads, d) given (B, T, H, W, 2, heads, d)
    -> out: (B, T or 1, H, W, heads, d), log-sum-exp: (B, positions, heads, queries) float32."""
    q, k, v = _unpack(qkv, query, sin, cos, axis)
    scores = scale * q @ k.mT
    out = from_sequences(scores.softmax(-1) @ v, axis, qkv.shape[2], qkv.shape[3])
    return out.to(qkv.dtype).contiguous(), scores.logsumexp(-1).float()


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
    q, k, v = _unpack(qkv, query, sin, cos, axis)
    g, o = (to_sequences(t, axis) for t in wide(grad, out))
    p = (scale * q @ k.mT).softmax(-1)
    ds = scale * p * (g @ v.mT - (g * o).sum(-1, keepdim=True))
    dq, dk, dv = ds @ k, ds.mT @ q, p.mT @ g
    dqkv = torch.empty_like(qkv)
    if query is not None:
        dqkv.copy_(from_sequences(torch.stack((dk, dv)), axis, qkv.shape[2], qkv.shape[3]))
        dquery = from_sequences(dq, axis, qkv.shape[2], qkv.shape[3])
        return dqkv, dquery.to(query.dtype).contiguous()
    gradients = torch.stack((_unrotate(dq, sin, cos), _unrotate(dk, sin, cos), dv))
    dqkv.copy_(from_sequences(gradients, axis, qkv.shape[2], qkv.shape[3]))
    return dqkv, qkv.new_empty(0)

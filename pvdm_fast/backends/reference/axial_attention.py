"""Attention along one axis of a lattice, with PVDM's table rotation of queries and keys.

A lattice is (B, T, H, W). Along axis "time", a sequence is the T tokens of one site. Along axis "space", it is the H W
tokens of one frame. If `query` is given, it is the single query of each sequence, and `qkv` holds only keys and values.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from pvdm_fast.backends.reference import in_order_of, softmax, wide


def rotate_pairs(x: Tensor) -> Tensor:
    """Turns each neighbouring pair (a, b) of the last axis into (-b, a)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), dim=-1).flatten(-2)


def rotate_pairs_transposed(x: Tensor) -> Tensor:
    """The transpose of `rotate_pairs`: turns each pair (a, b) into (b, -a)."""
    return -rotate_pairs(x)


# A lattice, and its sequences along each axis: (positions, length) are (H W, T) along time, (T, H W) along space.
LATTICE = "b t h w {} heads d"
SEQUENCES = {"time": "{} b (h w) heads t d", "space": "{} b t heads (h w) d"}


def to_sequences(x: Tensor, axis: str) -> Tensor:
    """(B, T, H, W, *, heads, d) -> (*, B, positions, heads, length, d) for axis "time" or "space"."""
    parts = "parts" if x.dim() == 7 else ""
    return rearrange(x, f"{LATTICE.format(parts)} -> {SEQUENCES[axis].format(parts)}")


def from_sequences(x: Tensor, axis: str, height: int, width: int) -> Tensor:
    """The inverse of `to_sequences`."""
    parts = "parts" if x.dim() == 6 else ""
    return rearrange(x, f"{SEQUENCES[axis].format(parts)} -> {LATTICE.format(parts)}", h=height, w=width)


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
    -> out: (B, T or 1, H, W, heads, d), log-sum-exp: (B, positions, heads, queries), float32 at least."""
    q, k, v = _unpack(qkv, query, sin, cos, axis)
    scores = scale * q @ k.mT
    out = from_sequences(softmax(scores) @ v, axis, qkv.shape[2], qkv.shape[3])
    return out.to(qkv.dtype).contiguous(), scores.logsumexp(-1)


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
    q, k, v = _unpack(qkv, query, sin, cos, axis)
    g, o = (to_sequences(t, axis) for t in wide(grad, out))
    p = softmax(scale * q @ k.mT)
    ds = scale * p * (g @ v.mT - (g * o).sum(-1, keepdim=True))
    dq, dk, dv = ds @ k, ds.mT @ q, p.mT @ g
    height, width = qkv.shape[2:4]
    if query is not None:
        dqkv = from_sequences(torch.stack((dk, dv)), axis, height, width)
        dquery = from_sequences(dq, axis, height, width)
        return in_order_of(dqkv.to(qkv.dtype), qkv), dquery.to(query.dtype).contiguous()
    gradients = torch.stack((_unrotate(dq, sin, cos), _unrotate(dk, sin, cos), dv))
    dqkv = from_sequences(gradients, axis, height, width)
    return in_order_of(dqkv.to(qkv.dtype), qkv), qkv.new_empty(0)


def backward_of_inputs(
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
    again = forward(wide(qkv)[0], query, sin, cos, axis, scale)
    return backward(grad, qkv, query, sin, cos, *again, axis, scale)


def jvp(
    qkv: Tensor, tangent: Tensor, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `forward`, and the tangent of the first from that of `qkv` (see `segment_attention.jvp`)."""
    q, k, v = _unpack(qkv, None, sin, cos, axis)
    dq, dk, dv = _unpack(tangent, None, sin, cos, axis)
    scores, change = scale * q @ k.mT, scale * (dq @ k.mT + q @ dk.mT)
    p = softmax(scores)
    tangents = (p * (change - (p * change).sum(-1, keepdim=True))) @ v + p @ dv
    out, dout = (from_sequences(t, axis, *qkv.shape[2:4]).to(qkv.dtype).contiguous() for t in (p @ v, tangents))
    return out, scores.logsumexp(-1), dout

"""`segment_attention` on the CPU: flash-style in C++, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import rows_dense


def forward(qkv: Tensor, offsets: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """qkv: (B, N, 3, heads, d) -> out: (B, N, heads, d), log-sum-exp of the scores: (B, heads, N) float32."""
    batch, tokens, _, heads, width = qkv.shape
    out = torch.empty(batch, tokens, heads, width, dtype=qkv.dtype)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32)
    extension("_cpu").attention_forward(
        rows_dense(qkv).unsqueeze(1),
        *(None, None, None),
        out.unsqueeze(1),
        lse.unsqueeze(1),
        *(list(offsets), scale, torch.get_num_threads()),
    )
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Sequence[int], scale: float) -> Tensor:
    """The gradient of `qkv`, with its shape and memory order."""
    dqkv = torch.empty_like(qkv)
    written = dqkv if dqkv.stride(-1) == 1 else torch.empty_like(dqkv, memory_format=torch.contiguous_format)
    extension("_cpu").attention_backward(
        rows_dense(grad).unsqueeze(1),
        rows_dense(qkv).unsqueeze(1),
        *(None, None, None),
        rows_dense(out).unsqueeze(1),
        rows_dense(lse).unsqueeze(1),
        written.unsqueeze(1),
        None,
        *(list(offsets), scale, torch.get_num_threads()),
    )
    return dqkv if written is dqkv else dqkv.copy_(written)


def jvp(qkv: Tensor, tangent: Tensor, offsets: Sequence[int], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `forward`, and the tangent of the first from that of `qkv`. Memory is O(N)."""
    batch, tokens, _, heads, width = qkv.shape
    out = torch.empty(batch, tokens, heads, width, dtype=qkv.dtype)
    dout, lse = torch.empty_like(out), torch.empty(batch, heads, tokens, dtype=torch.float32)
    extension("_cpu").attention_jvp(
        rows_dense(qkv).unsqueeze(1),
        rows_dense(tangent.to(qkv.dtype)).unsqueeze(1),
        *(None, None),
        out.unsqueeze(1),
        lse.unsqueeze(1),
        dout.unsqueeze(1),
        *(list(offsets), scale, torch.get_num_threads()),
    )
    return out, lse, dout

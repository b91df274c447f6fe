"""A lattice of tokens as sequences along one of its axes. Only strides change, nothing is rearranged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends.rows import rows_dense


def sequences_of(x: Tensor, axis: str) -> Tensor:
    """(B, T, H, W, ...) -> (B, sites, L, ...). Copies only if H and W don't merge into one axis, or rows aren't
    dense."""
    x = rows_dense(x).flatten(2, 3)
    return x.transpose(1, 2) if axis == "time" else x


def sequences_to_fill(like: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """A tensor for kernels to fill, and its sequences, which share its memory. It is `like` itself if its strides
    allow."""
    sequences = sequences_of(like, axis)
    torch_c: Any = torch._C
    if torch_c._is_alias_of(sequences, like):  # shares memory; works for tensors without memory too
        return like, sequences
    dense = torch.empty_like(like, memory_format=torch.contiguous_format)
    return dense, sequences_of(dense, axis)

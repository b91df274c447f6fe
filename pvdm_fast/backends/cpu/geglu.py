"""`geglu` on the CPU: one pass in each direction, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.backends.cpu import rows_of
from pvdm_fast.backends.extensions import extension


def forward(x: Tensor) -> Tensor:
    """x: (..., 2M), halves (value | gate) -> (..., M)."""
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    extension("_cpu").geglu_forward(rows_of(x), rows_of(out), torch.get_num_threads())
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from grad: (..., M)."""
    dx = x.new_empty(x.shape)
    extension("_cpu").geglu_backward(rows_of(grad.to(x.dtype)), rows_of(x), rows_of(dx), torch.get_num_threads())
    return dx

"""`geglu` on the CPU: one pass in each direction, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.backends.cpu import kernel_rows
from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import as_dtype, empty_as


def forward(x: Tensor) -> Tensor:
    """x: (..., 2M), halves (value | gate) -> (..., M)."""
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    extension("_cpu").geglu_forward(kernel_rows(x), out, torch.get_num_threads())
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from grad: (..., M)."""
    dx = empty_as(x)
    extension("_cpu").geglu_backward(kernel_rows(as_dtype(grad, x.dtype)), kernel_rows(x), dx, torch.get_num_threads())
    return dx

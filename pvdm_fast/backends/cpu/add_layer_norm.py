"""`add_layer_norm` on the CPU, in C++: each direction reads every row from memory once."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.backends.cpu import kernel_rows
from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import as_dtype, empty_as, parameter


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual: (..., C) -> their sum (empty without a residual) and its norm in the residual's dtype, else that of
    x; per row mean and 1 / std, float32."""
    mean = torch.empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    total, normed = _forward(x, residual, weight, bias, eps, mean, rstd)
    return x.new_empty(0) if total is None else total, normed, mean, rstd


def forward_alone(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor | None, Tensor, None, None]:
    """`forward` where no backward pass follows: the statistics are not kept."""
    return *_forward(x, residual, weight, bias, eps, None, None), None, None


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    like = x if residual is None else residual
    normed = empty_as(like)
    total = None if residual is None else empty_as(like)
    tensors = (
        kernel_rows(x),
        None if residual is None else kernel_rows(residual),
        parameter(weight),
        parameter(bias),
        *(total, normed, mean, rstd),
    )
    extension("_cpu").add_layer_norm_forward(tensors, eps, torch.get_num_threads())
    return total, normed


def backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum (so of x and residual alike), weight and bias."""
    dx = empty_as(total)
    dweight, dbias = (torch.empty_like(weight, dtype=torch.float32) for _ in range(2))
    tensors = (
        kernel_rows(as_dtype(grad_normed, total.dtype)),
        None if grad_total is None else kernel_rows(as_dtype(grad_total, total.dtype)),
        kernel_rows(total),
        parameter(weight),
        parameter(mean),
        parameter(rstd),
        dx,
        dweight,
        dbias,
    )
    extension("_cpu").add_layer_norm_backward(tensors, torch.get_num_threads())
    return dx, as_dtype(dweight, weight.dtype), as_dtype(dbias, weight.dtype)

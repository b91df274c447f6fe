"""`add_layer_norm` on the CPU, in C++: each direction reads every row from memory once."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.backends.cpu import rows_of
from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import parameter


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual: (..., C) -> their sum (empty without a residual), and its norm in the residual's dtype, or x's
    without one. Per row also mean and 1 / std, float32."""
    like = x if residual is None else residual
    normed = like.new_empty(x.shape)
    total = x.new_empty(0) if residual is None else like.new_empty(x.shape)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tensors = (
        rows_of(x),
        None if residual is None else rows_of(residual),
        parameter(weight),
        parameter(bias),
        None if residual is None else rows_of(total),
        rows_of(normed),
        mean.view(-1),
        rstd.view(-1),
    )
    extension("_cpu").add_layer_norm_forward(tensors, eps, torch.get_num_threads())
    return total, normed, mean, rstd


def backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum (the same for x and residual), weight and bias."""
    dx = total.new_empty(total.shape)
    dweight, dbias = (torch.empty(total.shape[-1], dtype=torch.float32) for _ in range(2))
    tensors = (
        rows_of(grad_normed.to(total.dtype)),
        None if grad_total is None else rows_of(grad_total.to(total.dtype)),
        rows_of(total),
        parameter(weight),
        parameter(mean.reshape(-1)),
        parameter(rstd.reshape(-1)),
        rows_of(dx),
        dweight,
        dbias,
    )
    extension("_cpu").add_layer_norm_backward(tensors, torch.get_num_threads())
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)

"""The residual sum and its LayerNorm, both returned."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.backends.reference import rstd_of, wide


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual: (..., C) -> x + residual (empty without a residual), its LayerNorm, and per row mean and 1 / std.

    The norm is that of the stored (rounded) sum. Results have the dtype of the residual, or x's without one. mean and 1
    / std are float32, or float64 for float64.
    """
    total = (x if residual is None else (residual + x).to(residual.dtype)).contiguous()
    tw, w, b = wide(total, weight, bias)
    variance, mean = torch.var_mean(tw, dim=-1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    normed = ((tw - mean) * rstd * w + b).to(total.dtype)
    stored = x.new_empty(0) if residual is None else total
    return stored, normed, mean.squeeze(-1), rstd.squeeze(-1)


def backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum (the same for x and residual), weight and bias."""
    tw, g, w, mean, rstd = wide(total, grad_normed, weight, mean, rstd)
    normed = (tw - mean[..., None]) * rstd[..., None]
    dn = g * w
    averages = dn.mean(-1, keepdim=True) + normed * (dn * normed).mean(-1, keepdim=True)
    dx = rstd[..., None] * (dn - averages)
    if grad_total is not None:
        dx = dx + grad_total
    dweight, dbias = (t.reshape(-1, t.shape[-1]).sum(0).to(weight.dtype) for t in (g * normed, g))
    return dx.to(total.dtype).contiguous(), dweight, dbias


def backward_of_inputs(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    variance, mean = torch.var_mean(wide(total)[0], dim=-1, correction=0)
    return backward(grad_normed, grad_total, total, weight, mean, rstd_of(variance, rstd))

"""`plane_norm` on the CPU, in C++: two passes over memory in each direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import parameter, rows_dense


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_shift: Tensor | None,
    planes: Sequence[int],
    groups: int,
    eps: float,
    activation: bool,
    resample: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (B, N, C) -> y: (B, N', C); mean and 1 / std: (B, planes, groups) float32."""
    batch, tokens, channels = x.shape
    tokens = tokens * 4 if resample > 0 else tokens // 4 if resample < 0 else tokens
    y = x.new_empty(batch, tokens, channels)
    mean = torch.empty(batch, len(planes) // 2, groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    modulation = None if scale_shift is None else parameter(scale_shift)
    extension("_cpu").plane_norm_forward(
        (rows_dense(x), parameter(weight), parameter(bias), modulation, mean, rstd),
        *(y, list(planes), groups, eps, activation, resample),
        torch.get_num_threads(),
    )
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    planes: Sequence[int],
    groups: int,
    activation: bool,
    resample: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and scale_shift (empty if there is none)."""
    dx = x.new_empty(x.shape)
    dweight, dbias = (torch.empty(x.shape[2], dtype=torch.float32) for _ in range(2))
    dscale_shift = None if scale_shift is None else torch.empty(scale_shift.shape, dtype=torch.float32)
    modulation = None if scale_shift is None else parameter(scale_shift)
    extension("_cpu").plane_norm_backward(
        (rows_dense(x), parameter(weight), parameter(bias), modulation, parameter(mean), parameter(rstd)),
        (rows_dense(grad.to(x.dtype)), dx, dweight, dbias, dscale_shift),
        *(list(planes), groups, activation, resample),
        torch.get_num_threads(),
    )
    if scale_shift is None or dscale_shift is None:
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), x.new_empty(0)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dscale_shift.to(scale_shift.dtype)

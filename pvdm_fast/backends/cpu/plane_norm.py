"""`plane_norm` on the CPU, in C++: two passes over memory in each direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import as_dtype, empty_as, parameter, rows_dense


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
    if resample == 0:
        y = empty_as(x)
    else:
        y = x.new_empty(batch, tokens * 4 if resample > 0 else tokens // 4, channels)
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
    """Gradients of x, weight, bias, and of scale_shift (empty where there is none)."""
    dx = empty_as(x)
    dweight, dbias = torch.empty_like(weight, dtype=torch.float32), torch.empty_like(bias, dtype=torch.float32)
    dscale_shift = None if scale_shift is None else torch.empty(scale_shift.shape, dtype=torch.float32)
    modulation = None if scale_shift is None else parameter(scale_shift)
    extension("_cpu").plane_norm_backward(
        (rows_dense(x), parameter(weight), parameter(bias), modulation, parameter(mean), parameter(rstd)),
        (rows_dense(as_dtype(grad, x.dtype)), dx, dweight, dbias, dscale_shift),
        *(list(planes), groups, activation, resample),
        torch.get_num_threads(),
    )
    dweight, dbias = as_dtype(dweight, weight.dtype), as_dtype(dbias, bias.dtype)
    if scale_shift is None or dscale_shift is None:
        return dx, dweight, dbias, x.new_empty(0)
    return dx, dweight, dbias, as_dtype(dscale_shift, scale_shift.dtype)

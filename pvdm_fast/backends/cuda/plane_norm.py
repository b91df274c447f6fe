"""`plane_norm` on a GPU: statistics by chunks, then their totals, then one pass that writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends.cuda import launch_refusal, launch_target
from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import parameter, rows_dense

MOST_PLANES = 32  # the kernels' arguments hold all sizes
MOST_TOKENS = (2**31 - 1) // 4  # of all planes: tokens of doubled sides are counted in 32 bits


def refusal(*inputs: Any) -> str | None:
    """Why the kernels don't take these arguments (of either direction, the planes' sizes as a list), or None."""
    where = next(i for i, value in enumerate(inputs) if isinstance(value, (list, tuple)))
    planes, groups = inputs[where], inputs[where + 1]
    batch, _, channels = inputs[0].shape
    count = len(planes) // 2
    tokens = sum(rows * columns for rows, columns in zip(planes[::2], planes[1::2], strict=True))
    if count > MOST_PLANES:
        return f"it takes at most {MOST_PLANES} planes, not {count}: use another backend."
    if tokens > MOST_TOKENS:
        return f"it takes planes of at most {MOST_TOKENS} tokens, not {tokens}: use another backend."
    written = tokens * 4 if inputs[-1] > 0 else tokens
    return launch_refusal(batch * written, channels) or launch_refusal(batch * count * groups)


def _workspace(x: Tensor, groups: int, planes: Sequence[int]) -> Tensor:
    size = extension("_cuda").plane_norm_workspace(x.shape[0], x.shape[2], groups, list(planes))
    return torch.empty(size, dtype=torch.float32, device=x.device)


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
    mean = torch.empty(batch, len(planes) // 2, groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    modulation = None if scale_shift is None else parameter(scale_shift)
    extension("_cuda").plane_norm_forward(
        (rows_dense(x), parameter(weight), parameter(bias), modulation, mean, rstd),
        *(y, _workspace(x, groups, planes), list(planes), groups, eps, activation, resample),
        *launch_target(x),
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
    dweight, dbias = (torch.empty(x.shape[2], dtype=torch.float32, device=x.device) for _ in range(2))
    modulation = None if scale_shift is None else parameter(scale_shift)
    dscale_shift = None if modulation is None else torch.empty(modulation.shape, dtype=torch.float32, device=x.device)
    extension("_cuda").plane_norm_backward(
        (rows_dense(x), parameter(weight), parameter(bias), modulation, parameter(mean), parameter(rstd)),
        (rows_dense(grad.to(x.dtype)), dx, dweight, dbias, dscale_shift),
        *(_workspace(x, groups, planes), list(planes), groups, activation, resample),
        *launch_target(x),
    )
    if scale_shift is None or dscale_shift is None:
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), x.new_empty(0)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dscale_shift.to(scale_shift.dtype)

"""GroupNorm of each plane separately, then scale and shift, SiLU, and x2 resampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.reference import rstd_of, wide
from pvdm_fast.backends.reference.plane_resample import resample_planes, resample_planes_transposed
from pvdm_fast.layout import PlaneLayout


def _per_token(statistic: Tensor, layout: PlaneLayout, channels: int) -> Tensor:
    """(B, planes, groups) -> (B, N, C)."""
    lengths = torch.tensor([rows * columns for rows, columns in layout.planes], device=statistic.device)
    per_channel = statistic.repeat_interleave(channels // statistic.shape[-1], dim=-1)
    return per_channel.repeat_interleave(lengths, dim=1, output_size=layout.num_tokens)


def _statistics(x: Tensor, layout: PlaneLayout, groups: int) -> tuple[Tensor, Tensor]:
    """Variance and mean of each plane and group: (B, planes, groups)."""
    planes = layout.split(x.unflatten(-1, (groups, -1)))
    variances, means = zip(*(torch.var_mean(p, dim=(1, 2, 4), correction=0) for p in planes), strict=True)
    return torch.stack(variances, dim=1), torch.stack(means, dim=1)


def _affine(normed: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor | None) -> Tensor:
    z = normed * weight + bias
    if scale_shift is None:
        return z
    scale, shift = scale_shift[:, None].chunk(2, dim=-1)
    return z * (1 + scale) + shift


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
    """x: (B, N, C) -> y: (B, N', C); mean and 1 / std: (B, planes, groups), float32 at least."""
    layout = PlaneLayout.from_sizes(planes)
    xw, weight, bias = wide(x, weight, bias)
    variance, mean = _statistics(xw, layout, groups)
    rstd = (variance + eps).rsqrt()
    normed = (xw - _per_token(mean, layout, x.shape[-1])) * _per_token(rstd, layout, x.shape[-1])
    y = _affine(normed, weight, bias, None if scale_shift is None else scale_shift.to(xw.dtype))
    if activation:
        y = F.silu(y)
    return resample_planes(y, layout, resample).to(x.dtype).contiguous(), mean, rstd


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
    """Gradients of x, weight, bias and scale_shift (empty if there is none).

    With n = (x - mean) rstd and dn the gradient of n: dx = rstd (dn - avg(dn) - n avg(dn n)), averaged over a group.
    """
    layout = PlaneLayout.from_sizes(planes)
    xw, g, w, b, mean, rstd = wide(x, grad, weight, bias, mean, rstd)
    modulation = None if scale_shift is None else scale_shift.to(xw.dtype)
    rstd_token = _per_token(rstd, layout, x.shape[-1])
    normed = (xw - _per_token(mean, layout, x.shape[-1])) * rstd_token
    dz = resample_planes_transposed(g, layout, resample)
    if activation:
        z = _affine(normed, w, b, modulation)
        s = z.sigmoid()
        dz = dz * s * (1 + z * (1 - s))
    dscale_shift = x.new_empty(0)
    if modulation is not None and scale_shift is not None:
        dscale, dshift = (dz * (normed * w + b)).sum(1), dz.sum(1)
        dscale_shift = torch.cat((dscale, dshift), dim=-1).to(scale_shift.dtype)
        dz = dz * (1 + modulation[:, None].chunk(2, dim=-1)[0])
    dweight, dbias = (dz * normed).sum((0, 1)), dz.sum((0, 1))
    dn = dz * w

    def group_average(t: Tensor) -> Tensor:
        averages = [p.mean((1, 2, 4)) for p in layout.split(t.unflatten(-1, (groups, -1)))]
        return _per_token(torch.stack(averages, dim=1), layout, x.shape[-1])

    dx = rstd_token * (dn - group_average(dn) - normed * group_average(dn * normed))
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype), dbias.to(bias.dtype), dscale_shift


def backward_of_inputs(
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
    variance, mean = _statistics(wide(x)[0], PlaneLayout.from_sizes(planes), groups)
    statistics = mean, rstd_of(variance, rstd)
    return backward(grad, x, weight, bias, scale_shift, *statistics, planes, groups, activation, resample)

"""GroupNorm per plane or over all planes, then scale and shift, SiLU, and x2 resampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.reference import wide
from pvdm_fast.reference.plane_resample import resample_planes, resample_planes_transposed


def _spans(layout: TriplaneLayout, joint: bool) -> list[slice]:
    """The token ranges that share statistics: the three planes, or all of them."""
    bounds = (0, layout.num_tokens) if joint else layout.offsets
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _per_token(statistic: Tensor, layout: TriplaneLayout, joint: bool, channels: int) -> Tensor:
    """(B, spans, groups) -> (B, N, C)."""
    lengths = torch.tensor([s.stop - s.start for s in _spans(layout, joint)], device=statistic.device)
    per_channel = statistic.repeat_interleave(channels // statistic.shape[-1], dim=-1)
    return per_channel.repeat_interleave(lengths, dim=1, output_size=layout.num_tokens)


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
    time: int,
    height: int,
    width: int,
    groups: int,
    eps: float,
    joint: bool,
    activation: bool,
    resample: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (B, N, C) -> y: (B, N', C); mean and 1 / std: (B, 3, or 1 if joint, groups) float32."""
    layout = TriplaneLayout(time, height, width)
    xw, weight, bias = wide(x, weight, bias)
    grouped = xw.unflatten(-1, (groups, -1))
    statistics = [
        torch.var_mean(grouped[:, span], dim=(1, 3), correction=0) for span in _spans(layout, joint)
    ]
    mean = torch.stack([m for _, m in statistics], dim=1)
    rstd = torch.stack([(v + eps).rsqrt() for v, _ in statistics], dim=1)
    normed = (xw - _per_token(mean, layout, joint, x.shape[-1])) * _per_token(rstd, layout, joint, x.shape[-1])
    y = _affine(normed, weight, bias, None if scale_shift is None else scale_shift.to(xw.dtype))
    if activation:
        y = F.silu(y)
    return resample_planes(y, layout, resample).to(x.dtype), mean.float(), rstd.float()


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    time: int,
    height: int,
    width: int,
    groups: int,
    joint: bool,
    activation: bool,
    resample: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, and of scale_shift (empty where there is none).

    With n = (x - mean) rstd and dn the gradient of n: dx = rstd (dn - avg(dn) - n avg(dn n)), averages over a group.
    """
    layout = TriplaneLayout(time, height, width)
    xw, g, w, b, mean, rstd = wide(x, grad, weight, bias, mean, rstd)
    film = None if scale_shift is None else scale_shift.to(xw.dtype)
    rstd_token = _per_token(rstd, layout, joint, x.shape[-1])
    normed = (xw - _per_token(mean, layout, joint, x.shape[-1])) * rstd_token
    dz = resample_planes_transposed(g, layout, resample)
    if activation:
        z = _affine(normed, w, b, film)
        s = z.sigmoid()
        dz = dz * s * (1 + z * (1 - s))
    dfilm = x.new_empty(0)
    if film is not None and scale_shift is not None:
        dscale, dshift = (dz * (normed * w + b)).sum(1), dz.sum(1)
        dfilm = torch.cat((dscale, dshift), dim=-1).to(scale_shift.dtype)
        dz = dz * (1 + film[:, None].chunk(2, dim=-1)[0])
    dweight, dbias = (dz * normed).sum((0, 1)), dz.sum((0, 1))
    dn = dz * w

    def group_average(t: Tensor) -> Tensor:
        grouped = t.unflatten(-1, (groups, -1))
        spans = _spans(layout, joint)
        return _per_token(torch.stack([grouped[:, s].mean((1, 3)) for s in spans], 1), layout, joint, x.shape[-1])

    dx = rstd_token * (dn - group_average(dn) - normed * group_average(dn * normed))
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype), dfilm

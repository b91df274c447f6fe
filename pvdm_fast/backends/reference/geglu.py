"""x GELU(g) of the two halves of the last axis, GELU in its erf form."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.reference import wide


def forward(x: Tensor) -> Tensor:
    """x: (..., 2M), halves (value | gate) -> (..., M)."""
    value, gate = wide(x)[0].chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype).contiguous()


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x: GELU'(g) = cdf(g) + g pdf(g), of the standard normal distribution."""
    xw, g = wide(x, grad)
    value, gate = xw.chunk(2, dim=-1)
    cdf, slope = gelu_slope(gate)
    return torch.cat((g * gate * cdf, g * value * slope), dim=-1).to(x.dtype).contiguous()


def gelu_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """cdf(x), and GELU'(x) = cdf(x) + x pdf(x)."""
    cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    pdf = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return cdf, cdf + x * pdf

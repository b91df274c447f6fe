"""The 3 x 3 convolution that packed planes share, with zeros beyond each plane's own edge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from pvdm_fast.backends.rows import order_of
from pvdm_fast.layout import PlaneLayout


def _images(x: Tensor, layout: PlaneLayout) -> list[Tensor]:
    """The planes as (B, C, h, w) views, channels last in memory."""
    return [rearrange(plane, "b h w c -> b c h w") for plane in layout.split(x)]


def _pack(images: Sequence[Tensor]) -> Tensor:
    return torch.cat([rearrange(image, "b c h w -> b (h w) c") for image in images], dim=1)


def forward(x: Tensor, weight: Tensor, bias: Tensor, planes: Sequence[int], residual: Tensor | None = None) -> Tensor:
    """x: (B, N, C), weight: (C', C, 3, 3), bias: (C'), residual: (B, N, C') or None -> (B, N, C')."""
    layout = PlaneLayout.from_sizes(planes)
    out = _pack([F.conv2d(image, weight, bias, padding=1) for image in _images(x, layout)])
    return out if residual is None else out + residual


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, planes: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias. Those of x and weight are empty unless `needs` asks for them."""
    layout = PlaneLayout.from_sizes(planes)
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    pairs = list(zip(_images(x, layout), _images(grad, layout), strict=True))
    if needs[0]:
        dx = _pack([conv2d_input(image.shape, weight, g, padding=1) for image, g in pairs])
    if needs[1]:
        parts = [conv2d_weight(image, weight.shape, g, padding=1) for image, g in pairs]
        dweight = torch.stack(parts).sum(0).contiguous(memory_format=order_of(weight))
    return dx, dweight, grad.sum((0, 1))

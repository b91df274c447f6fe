"""x2 resampling of every plane of a packed buffer: nearest upwards, 2 x 2 mean downwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pvdm_fast.layout import PlaneLayout


def _double(plane: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, 2h, 2w, C), each token repeated."""
    twice = plane[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return twice.flatten(1, 2).flatten(2, 3)  # one copy


def _halve(plane: Tensor) -> Tensor:
    """(B, 2h, 2w, C) -> (B, h, w, C), the mean of each 2 x 2 square."""
    return plane.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean(dim=(2, 4))


def resample_planes(x: Tensor, layout: PlaneLayout, resample: int) -> Tensor:
    """x: (B, N, C) of `layout` -> (B, N', C): +1 doubles each plane's sides, -1 halves them, 0 does nothing.

    Raises:
        ValueError: halving a layout with an odd size.
    """
    if resample == 0:
        return x
    if resample < 0:
        layout.downsample(2)
    change = _double if resample > 0 else _halve
    return torch.cat([change(plane).flatten(1, 2) for plane in layout.split(x)], dim=1)


def resample_planes_transposed(grad: Tensor, layout: PlaneLayout, resample: int) -> Tensor:
    """The gradient of the input (of `layout`) of `resample_planes` from that of its output: the other direction,
    scaled."""
    if resample == 0:
        return grad
    if resample > 0:
        return 4 * resample_planes(grad, layout.upsample(2), -1)
    return resample_planes(grad, layout.downsample(2), 1) / 4


def forward(x: Tensor, planes: Sequence[int], resample: int) -> Tensor:
    """x: (B, N, C) -> (B, N', C)."""
    return resample_planes(x, PlaneLayout.from_sizes(planes), resample).contiguous()


def backward(grad: Tensor, planes: Sequence[int], resample: int) -> Tensor:
    """The gradient of x, which has `planes`, from grad: (B, N', C)."""
    return resample_planes_transposed(grad, PlaneLayout.from_sizes(planes), resample).contiguous()

"""PyTorch's own layers, with their parameters, computing on packed planes. Also what replaces them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pvdm_fast import ops
from pvdm_fast.backends import choice
from pvdm_fast.backends.reference.plane_resample import resample_planes
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.nn import copies
from pvdm_fast.nn.linear import linear
from pvdm_fast.nn.plain import POINTWISE_2D, THREE_BY_THREE, is_plain, readable, shape_of, weights_of
from pvdm_fast.ops.derivatives import autocast_dtype
from pvdm_fast.ops.plane_resample import STEPS

NORM_GROUPS = 32
# Where kernels read the weight of a 3x3 convolution with dense input channels, which is PyTorch's channels_last.
CHANNELS_LAST = frozenset({"cuda"})


@readable
class PlaneNorm(nn.GroupNorm):
    """GroupNorm(32) of each plane separately."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels)

    def forward(self, x: Tensor, layout: PlaneLayout | None = None) -> Tensor:
        """x: (B, N, C) packed tokens of `layout` -> (B, N, C). Without a layout, like nn.GroupNorm."""
        if layout is None:
            return super().forward(x)
        return ops.plane_norm(x, layout, self.weight, self.bias, groups=self.num_groups, eps=self.eps)


@readable
class PlaneConv(nn.Conv2d):
    """3x3 convolution of each plane with shared weights: see `pvdm_fast.ops.plane_conv`.

    If you pass a kernel_size, it takes the arguments of nn.Conv2d. peft makes the factors of an adapter like this, as
    more layers of the adapted one's class.
    """

    def __init__(
        self, channels: int, out_channels: int, kernel_size: Any = None, *options: Any, zero: bool = False, **more: Any
    ) -> None:
        if kernel_size is None:
            super().__init__(channels, out_channels, 3, padding=1)
        else:
            super().__init__(channels, out_channels, kernel_size, *options, **more)
        if zero:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        self.rearrange()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlaneConv:
        """Runs when the layer is moved or cast."""
        super()._apply(fn, recurse)
        self.rearrange()
        return self

    def rearrange(self) -> None:
        """Bring the weight into the order of memory in which its device's kernels read it: otherwise each call would
        copy it. What FSDP has cut, and what a parametrization computes, stays as it is."""
        weight = self._parameters.get("weight")
        if weight is not None and not hasattr(weight, "to_local"):  # of a DTensor
            weight.data = as_kernels_read(weight.data)

    def forward(self, x: Tensor, layout: PlaneLayout | None = None) -> Tensor:
        """x: (B, N, C) packed tokens of `layout` -> (B, N, C'). Without a layout, like nn.Conv2d."""
        if layout is None:
            return super().forward(x)
        if self.bias is None or shape_of(self) != THREE_BY_THREE:  # changed after it was built
            return by_pictures(super().forward, x, layout)
        return ops.plane_conv(x, layout, copies.of(self.weight), copies.of(self.bias))


def as_kernels_read(weight: Tensor) -> Tensor:
    """The weight of a 3x3 convolution in the order of memory in which its device's kernels read it."""
    last = weight.device.type in CHANNELS_LAST
    return weight.contiguous(memory_format=torch.channels_last) if last else weight


def by_pictures(layer: Callable[[Tensor], Tensor], x: Tensor, layout: PlaneLayout) -> Tensor:
    """Calls a layer of images (b, c, h, w) for each plane: x (B, N, C) packed tokens of `layout` -> (B, N', C')."""
    planes = [layer(rearrange(plane, "b h w c -> b c h w")) for plane in layout.split(x)]
    return torch.cat([rearrange(plane, "b c h w -> b (h w) c") for plane in planes], dim=1)


def norm(
    layer: nn.Module,
    x: Tensor,
    layout: PlaneLayout,
    *,
    scale_shift: Tensor | None = None,
    activation: bool = False,
    resample: str | None = None,
) -> Tensor:
    """Applies a PlaneNorm, or what replaces it, to x, with what may follow: see `ops.plane_norm`.

    Args:
        x: (B, N, C) packed tokens of `layout`.

    Returns:
        (B, N', C), in one operation if the layer is plain.
    """
    weights = weights_of(layer, PlaneNorm)
    if weights is not None:
        return ops.plane_norm(
            x,
            layout,
            *weights,
            scale_shift=scale_shift,
            groups=layer.__dict__["num_groups"],
            eps=layer.__dict__["eps"],
            activation=activation,
            resample=resample,
        )
    x = layer(x, layout) if isinstance(layer, PlaneNorm) else by_pictures(layer, x, layout)
    if scale_shift is not None:
        scale, shift = scale_shift[:, None].chunk(2, dim=-1)
        x = x * (1 + scale) + shift
    x = F.silu(x) if activation else x
    return x if resample is None else resampled(x, layout, resample)


def resampled(x: Tensor, layout: PlaneLayout, resample: str) -> Tensor:
    """`ops.plane_resample` where Triton serves it. Elsewhere in PyTorch's own operations, which are as fast, and which
    torch.compile fuses with others."""
    if torch.compiler.is_compiling() or not choice.serves(
        "triton", "plane_resample", choice.requested(), x.device.type, x.dtype
    ):
        return resample_planes(x, layout, STEPS[resample])
    return ops.plane_resample(x, layout, resample)


def conv(layer: nn.Module, x: Tensor, layout: PlaneLayout, residual: Tensor | None = None) -> Tensor:
    """Applies a PlaneConv, or what replaces it, to packed tokens x (B, N, C) of `layout`: (B, N, C').

    Args:
        residual: (B, N, C'), added to the result: in one operation if the layer is plain and the dtypes are the same.
    """
    if residual is None:
        return layer(x, layout) if isinstance(layer, PlaneConv) else by_pictures(layer, x, layout)
    if residual.dtype == (autocast_dtype(x.device.type) or x.dtype):
        weights = weights_of(layer, PlaneConv, THREE_BY_THREE)
        if weights is not None:
            return ops.plane_conv(x, layout, *weights, residual)
    return residual + conv(layer, x, layout)


def pointwise(layer: nn.Module, x: Tensor, layout: PlaneLayout) -> Tensor:
    """Applies a 1x1 nn.Conv2d, or what replaces it, to packed tokens x (B, N, C) of `layout`: (B, N, C')."""
    weights = weights_of(layer, nn.Conv2d, POINTWISE_2D)
    if weights is not None:
        weight, bias = weights
        return linear(x, weight.flatten(1), bias)
    return x if is_plain(layer, nn.Identity) else by_pictures(layer, x, layout)

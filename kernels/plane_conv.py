"""`plane_conv` in Triton: one implicit matrix product for all planes, or the vendor's convolution if faster."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.plane_conv_backward import backward
from pvdm_fast.kernels.plane_conv_product import convolve, convolve_by_vendor, packed, vendor_is_chosen

__all__ = ["backward", "forward"]


def forward(x: Tensor, weight: Tensor, bias: Tensor, planes: Sequence[int], residual: Tensor | None = None) -> Tensor:
    """x: (B, N, C), weight: (C', C, 3, 3), bias: (C'), residual: (B, N, C') or None -> (B, N, C')."""
    if vendor_is_chosen(x, weight.shape[0]):
        out = convolve_by_vendor(x, weight, bias, planes)
        return out if residual is None else out.add_(residual)
    return convolve(x, packed(weight), rows_dense(bias), planes, mirrored=False, residual=residual)

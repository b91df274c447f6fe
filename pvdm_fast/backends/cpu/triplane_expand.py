"""`triplane_expand` on the CPU: the broadcast sums in C++, the small products with PyTorch's BLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.backends.expand_products import products
from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import parameter, rows_dense
from pvdm_fast.layout import TriplaneLayout


def forward(planes: Tensor, weight: Tensor, bias: Tensor, time: int, height: int, width: int) -> Tensor:
    """planes: (B, N, D), weight: (3, C, D) and bias: (3, C) in packed order -> (B, T H W, C)."""
    out = planes.new_empty(planes.shape[0], time * height * width, weight.shape[1])
    extension("_cpu").triplane_expand_forward(
        rows_dense(planes), parameter(weight), parameter(bias), out, time, height, width, torch.get_num_threads()
    )
    return out


def backward(
    grad: Tensor, planes: Tensor, weight: Tensor, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of planes, weight and bias from grad: (B, T H W, C), which is read once."""
    layout = TriplaneLayout(time, height, width)
    sums = torch.empty(grad.shape[0], layout.num_tokens, grad.shape[2], dtype=torch.float32)
    extension("_cpu").triplane_expand_sums(rows_dense(grad), sums, time, height, width, torch.get_num_threads())
    return products(sums, planes, weight, layout)

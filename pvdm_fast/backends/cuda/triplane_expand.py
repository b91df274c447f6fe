"""`triplane_expand` on a GPU: the broadcast sums in CUDA C++, backward's small products with PyTorch's BLAS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends.cuda import launch_refusal, launch_target
from pvdm_fast.backends.expand_products import products
from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.rows import parameter, rows_dense
from pvdm_fast.layout import TriplaneLayout


def refusal(*inputs: Any) -> str | None:
    """Why these arguments (of either direction, ending in a parameter (3, C, ...) and the sizes) are too large,
    or None."""
    *_, parameter, time, height, width = inputs
    tokens = max(time * height * width, height * width + time * width + time * height)
    return launch_refusal(inputs[0].shape[0] * tokens, parameter.shape[1])


def _workspace(like: Tensor, channels: int, time: int, height: int, width: int) -> Tensor:
    size = extension("_cuda").triplane_expand_workspace(like.shape[0], channels, time, height, width)
    return torch.empty(size, dtype=torch.float32, device=like.device)


def forward(planes: Tensor, weight: Tensor, bias: Tensor, time: int, height: int, width: int) -> Tensor:
    """planes: (B, N, D), weight: (3, C, D) and bias: (3, C) in packed order -> (B, T H W, C)."""
    channels = weight.shape[1]
    out = planes.new_empty(planes.shape[0], time * height * width, channels)
    workspace = _workspace(planes, channels, time, height, width)
    operands = (rows_dense(planes), parameter(weight), parameter(bias), out, workspace)
    extension("_cuda").triplane_expand_forward(*operands, time, height, width, *launch_target(planes))
    return out


def backward(
    grad: Tensor, planes: Tensor, weight: Tensor, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of planes, weight and bias from grad: (B, T H W, C), which is read once."""
    layout = TriplaneLayout(time, height, width)
    batch, _, channels = grad.shape
    sums = torch.empty(batch, layout.num_tokens, channels, dtype=torch.float32, device=grad.device)
    workspace = _workspace(grad, channels, time, height, width)
    extension("_cuda").triplane_expand_sums(
        rows_dense(grad), sums, workspace, time, height, width, *launch_target(grad)
    )
    return products(sums, planes, weight, layout)

"""`triplane_project` on the CPU: a tile of sequences stays in the cache through all layers, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.projection_layers import MATRICES, NAMES
from pvdm_fast.backends.rows import as_dtype, empty_as, parameter, rows_dense
from pvdm_fast.layout import PLANE_NAMES


def _read(arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The parameters as the kernel reads them, matrices in their own dtype, vectors in float32; and the numbers."""
    plane, *numbers = arguments[len(NAMES) :]
    named = zip(NAMES, arguments[: len(NAMES)], strict=True)
    tensors = tuple(tensor.contiguous() if name in MATRICES else parameter(tensor) for name, tensor in named)
    return tensors, (PLANE_NAMES.index(plane), *numbers, torch.get_num_threads())


def forward(x: Tensor, *arguments: Any) -> Tensor:
    """x: (B, T H W, C), then what the reference takes -> (B, sites, D) in the dtype of the matrices."""
    tensors, numbers = _read(arguments)
    length, latent = len(tensors[1]) - 1, len(tensors[-1])
    out = torch.empty(len(x), x.shape[1] // length, latent, dtype=torch.float32)
    extension("_cpu").triplane_project_forward(rows_dense(x), tensors, out, *numbers)
    return out.to(tensors[NAMES.index("qkv_weight")].dtype)


def backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x and of all parameters from grad: (B, sites, D)."""
    tensors, numbers = _read(arguments)
    dx = empty_as(x)
    gradients = tuple(torch.empty(t.shape, dtype=torch.float32) for t in tensors)
    extension("_cpu").triplane_project_backward(parameter(grad), rows_dense(x), tensors, dx, gradients, *numbers)
    originals = arguments[: len(NAMES)]
    return dx, *(as_dtype(g, t.dtype) for g, t in zip(gradients, originals, strict=True))

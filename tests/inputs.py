"""Shared by the tests of native kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_empty = torch.empty


def poisoned_empty(*size: Any, **options: Any) -> Tensor:
    """torch.empty full of NaN, so that anything a kernel doesn't write shows."""
    tensor = _empty(*size, **options)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def transposed(tensor: Tensor) -> Tensor:
    """The same values, with the memory of the first two axes swapped."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)

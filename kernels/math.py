"""What kernels of several operations share."""

from __future__ import annotations

import torch


def dot_precision() -> str:
    """How float32 products are computed, as PyTorch's own switch says; 16-bit operands don't depend on it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

"""How PyTorch's switches let float32 products be computed."""

from __future__ import annotations

import torch


def tf32_allowed() -> bool:
    """Whether float32 products on a GPU may be rounded to TF32.

    PyTorch has two switches for it. Reading the older one (`allow_tf32`) raises RuntimeError after a program has used
    the newer one (`fp32_precision`). The newer one reflects both, so this reads only that.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)  # before PyTorch 2.9

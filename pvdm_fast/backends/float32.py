"""How PyTorch's switches allow float32 products and convolutions to be computed."""

from __future__ import annotations

from typing import Any, Literal

import torch

Kind = Literal["product", "convolution"]


def tf32_allowed(kind: Kind = "product") -> bool:
    """Whether float32 products, or convolutions, on a GPU may be rounded to TF32, as PyTorch's own are.

    They have a switch each: that of products is off by default, that of convolutions is on. Without cuDNN PyTorch
    computes convolutions as products.

    Each has two generations. Reading the older one (`allow_tf32`) raises RuntimeError once a program has used the newer
    one (`fp32_precision`). The newer one tells what either was set to, so this reads it alone.
    """
    products: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    convolutions = kind == "convolution" and cudnn.enabled
    if hasattr(products, "fp32_precision"):
        return bool((cudnn.conv if convolutions else products).fp32_precision == "tf32")
    return bool((cudnn if convolutions else products).allow_tf32)  # before PyTorch 2.9

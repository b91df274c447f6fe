"""How PyTorch's switches allow float32 products and convolutions to be computed."""

from __future__ import annotations

from typing import Literal

import torch

Kind = Literal["product", "convolution"]


def tf32_allowed(kind: Kind = "product") -> bool:
    """Whether float32 products, or convolutions, on a GPU may be rounded to TF32, as PyTorch's own are.

    They have a switch each: that of products is off by default, that of convolutions is on. Without cuDNN PyTorch
    computes convolutions as products.

    Each has two generations. Reading the older one (`allow_tf32`) raises RuntimeError once a program has used the newer
    one (`fp32_precision`). The newer one tells what either was set to, so this reads it alone.
    """
    convolutions = kind == "convolution" and torch.backends.cudnn.enabled
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        switch = torch.backends.cudnn.conv if convolutions else torch.backends.cuda.matmul
        return bool(switch.fp32_precision == "tf32")
    return bool((torch.backends.cudnn if convolutions else torch.backends.cuda.matmul).allow_tf32)  # before 2.9

"""Every operation in plain PyTorch: the formula, its gradient, and the oracle of every test.

`forward` and `backward` of a module take the arguments of the registered operation of the same name. Statistics and
sums are in float32 at least (float64 for float64 inputs); results come back in the dtype of the first argument.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that the first is computed in: float64 stays, everything else becomes float32."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(t.to(dtype) for t in tensors)

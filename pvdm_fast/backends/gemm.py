"""The vendor's matrix product on the CPU, by the faster of PyTorch's two ways."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.precision import cpu_multiplies_bfloat16
from pvdm_fast.backends.rows import matrix, vector


@cache
def _onednn() -> bool:
    """Whether PyTorch has oneDNN's linear layer as an operation.

    Inductor calls it, so its schema is stable. It is still checked once, on a small product with a known result.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        one = torch.ones(1, 1)
        return bool(torch.ops.mkldnn._linear_pointwise(one, one, one[0], "none", [], "") == 2)
    except (AttributeError, RuntimeError, TypeError):
        return False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of tensors of `dtype` are fast and accurate: bfloat16 or float32.

    bfloat16 (with float32 sums) if the CPU multiplies it. float16 becomes float32, because PyTorch's float16 product
    runs at 2 to 25 GFLOP/s per core.
    """
    return dtype if dtype == torch.bfloat16 and cpu_multiplies_bfloat16() else torch.float32


# A call of oneDNN takes 14 us longer to set up than one of torch.mm. At this many multiplications that is what its
# product in float32 saves on a Zen 5 core (2.1 MFLOP at 90 and at 200 GFLOP/s).
LEAST_PRODUCTS = 1 << 20


def _small(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.float32 and x.numel() * weight.shape[0] < LEAST_PRODUCTS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x: (R, K), weight: (M, K), bias: (M), of any strides -> (R, M).

    By oneDNN also in float32, where torch.mm takes MKL: on an AMD Zen 5 core (peak 234 GFLOP/s) MKL does 90 GFLOP/s,
    oneDNN 200 (2048 x 2304 x 256, one thread). Small products are left to MKL. In bfloat16 torch.mm is oneDNN's anyway
    (390 of 465).
    """
    if _small(x, weight):
        return F.linear(x, weight, bias)
    if _onednn():
        bias = None if bias is None else vector(bias)
        return torch.ops.mkldnn._linear_pointwise(matrix(x), matrix(weight), bias, "none", [], "")
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x for grad: (R, M), x: (R, K) -> (M, K), contiguous.

    oneDNN transposes its first operand in memory, so the narrower one goes there. For (2048, 512) and (2048, 64) this
    takes 1.1 ms instead of 1.7 (torch.mm: 1.9). For (2048, 192) and (2048, 4) it takes 0.05 ms instead of 0.26
    (torch.mm: 0.35).
    """
    if _small(grad, x.t()):
        return grad.t() @ x
    if grad.shape[1] <= x.shape[1]:
        return linear(grad.t(), x.t())
    return linear(x.t(), grad.t()).t().contiguous()

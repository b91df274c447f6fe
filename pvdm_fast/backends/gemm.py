"""The vendor's matrix product on the CPU, by the quicker of torch's two ways to it."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.precision import cpu_multiplies_bfloat16
from pvdm_fast.backends.rows import matrix, vector


@cache
def _onednn() -> bool:
    """Whether torch has oneDNN's linear layer as an operation. Inductor calls it, so its schema is kept; checked all
    the same, once, on a small product whose result is known."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        one = torch.ones(1, 1)
        return bool(torch.ops.mkldnn._linear_pointwise(one, one, one[0], "none", [], "") == 2)
    except (AttributeError, RuntimeError, TypeError):
        return False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of tensors of `dtype` run fast and accurately: bfloat16 where the CPU multiplies it
    (in float32 sums), otherwise float32. float16 is widened: torch's float16 product runs at 2-25 GFLOP/s a core."""
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

    oneDNN transposes its first factor in memory, so the narrower one is put there: for (2048, 512) and (2048, 64) that
    takes 1.1 ms instead of 1.7 (torch.mm: 1.9), for (2048, 192) and (2048, 4) 0.05 instead of 0.26 (0.35).
    """
    if _small(grad, x.t()):
        return grad.t() @ x
    if grad.shape[1] <= x.shape[1]:
        return linear(grad.t(), x.t())
    return linear(x.t(), grad.t()).t().contiguous()

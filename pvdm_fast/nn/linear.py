"""Linear layers. In float32 on the CPU they use oneDNN, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvdm_fast.backends import choice, gemm
from pvdm_fast.backends.cpu import rows_of
from pvdm_fast.nn import copies
from pvdm_fast.nn.plain import readable
from pvdm_fast.ops.derivatives import transforming

# PyTorch computes smaller products, and those of fewer rows: a call of oneDNN takes 15 us to set up, and through
# autograd in Python 10 more. From here on it is 1.2 to 1.8 times as fast, forward and backward together, on one thread.
LEAST_PRODUCTS = 1 << 22
LEAST_ROWS = 64
TENSORS = frozenset({Tensor, nn.Parameter})  # other classes are fake, quantised, or compute in their own way


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= LEAST_PRODUCTS
        and x.numel() >= LEAST_ROWS * x.shape[-1]
        and not torch.compiler.is_compiling()
        and type(x) in TENSORS
        and type(weight) in TENSORS
        and not torch.is_autocast_enabled("cpu")
        and choice.requested() != "reference"
        and not transforming()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x: (R, K), weight: (M, K), outside autograd and autocast."""
    return gemm.linear(rows_of(x), weight, bias) if _by_onednn(x, weight) else F.linear(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x for grad: (R, M), x: (R, K), outside autograd and autocast."""
    return gemm.weight_gradient(rows_of(grad), rows_of(x)) if _by_onednn(x, grad.t()) else grad.t() @ x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return gemm.linear(rows_of(x), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = rows_of(grad)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # will be differentiated again, so use operations that PyTorch can differentiate
            dx, dweight = (
                (rows @ weight).view(x.shape) if needs_x else None,
                rows.t() @ rows_of(x) if needs_weight else None,
            )
        else:
            dx = gemm.linear(rows, weight.t()).view(x.shape) if needs_x else None
            dweight = gemm.weight_gradient(rows, rows_of(x)) if needs_weight else None
        return dx, dweight, rows.sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x (..., K), weight (M, K), which may be a view, bias (M) -> (..., M).

    In float32 on the CPU oneDNN computes all products, also those of the backward pass. On an AMD Zen 5 core they take
    half the time of PyTorch's own, which are MKL's (2048 rows, 256 -> 768: 3.9 and 8.4 ms). PyTorch computes small
    products, compiled code, the reference backend, forward-mode differentiation, `torch.func` and double backward.
    """
    if _by_onednn(x, weight):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


@readable
class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if copies.active() is None:
            return linear(x, weight, bias)
        return linear(x, copies.of(weight), None if bias is None else copies.of(bias))

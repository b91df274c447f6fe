"""Shared by kernels of several operations: functions of float32 values, and the precision of products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.float32 import Kind, tf32_allowed
from pvdm_fast.kernels.configs import architecture


def dot_precision(x: Tensor, kind: Kind = "product") -> str:
    """How `tl.dot` multiplies tensors like `x`: "tf32" where they are float32, PyTorch's switch for this kind allows it
    and the GPU is NVIDIA's; else "ieee". Of AMD's GPUs only gfx942 has TF32: others refuse to compile it. For 16 bits
    the switches aren't asked."""
    if x.dtype != torch.float32 or architecture(x.device).startswith("gfx"):
        return "ieee"
    return "tf32" if tf32_allowed(kind) else "ieee"


@triton.jit
def rounded_product(x, y):
    """x y, rounded before anything is added to it.

    For products that are summed over lanes. Each lane adds its own value and a neighbour's. By default the compiler
    fuses product and sum, so a lane's own product is exact and its neighbour's is rounded. The two lanes' sums then
    differ in the last bit, and chance decides which one reaches shared memory. benchmarks/machine_code.py finds such
    places.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def sum_of_products(x, y, axis: tl.constexpr):
    """The sum of x y along an axis, with the same bits in every lane. x and y have one shape."""
    return tl.sum(rounded_product(x, y), axis)


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_derivative(x):
    """s + x s (1 - s), s = sigmoid(x)."""
    s = 1.0 / (1.0 + tl.exp(-x))
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def normal(x):
    """The standard normal distribution function at x, and the density there.

    Abramowitz and Stegun 7.1.26, within 2.8e-7 in float32. One exponential serves both. libdevice's erf takes twice the
    instructions: with it, a forward GELU computes as long as it loads on an H100. And 1 + erf cancels below -2.
    """
    density = tl.exp2(-0.7213475204444817 * x * x)  # relative to its peak: exp(-x^2 / 2)
    t = 1.0 / (1.0 + 0.23164188821 * tl.abs(x))
    tail = 0.5307027145 * t - 0.7265760135
    tail = tail * t + 0.7107068705
    tail = tail * t - 0.142248368
    tail = (tail * t + 0.127414796) * t * density
    return tl.where(x < 0, tail, 1.0 - tail), 0.3989422804014327 * density


@triton.jit
def tanh(x):
    """The hyperbolic tangent, within 3e-7 of its value in float32. Near 0, where 1 - exp(-2 |x|) cancels, its series up
    to x^9."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    square = x * x
    near = square * 0.021869488536155203 - 0.05396825396825397
    near = near * square + 0.13333333333333333
    near = near * square - 0.3333333333333333
    near = near * square * x + x
    return tl.where(square < 0.09, near, tl.where(x < 0, -far, far))

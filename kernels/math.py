"""Functions of float32 values that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


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
def normal_cdf(x):
    """The standard normal distribution up to x, by erf."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def normal_pdf(x):
    """The standard normal density, exp(-x^2 / 2) / sqrt(2 pi)."""
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)

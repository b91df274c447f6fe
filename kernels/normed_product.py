"""LayerNorm of a tile's rows in the left operand of a product: the normed rows are never written.

A row is read three times, of which two are for its statistics. The first brings it to the L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pvdm_fast.kernels.math import sum_of_products

WIDEST = 16384  # channels, and inner: the weight of qkv then has at most 3 * 2^28 values, whose offsets fit 32 bits


@triton.jit
def statistics(x, rows, source, limit, eps, c, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and 1 / std of each row. The variance is summed in a pass of its own, around the mean."""
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        total += tl.sum(tl.load(x + source[:, None] * c + channel, mask=inside, other=0.0).to(tl.float32), 1)
    mean = total / c
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        value = tl.load(x + source[:, None] * c + channel, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - mean[:, None], 0.0)
        total += sum_of_products(value, value, 1)
    return mean, tl.rsqrt(total / c + eps)


@triton.jit
def normed_product(
    x, rows, source, limit, mean, rstd, gains, shifts, weight, output, exists, c,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """LayerNorm of the tile's rows, times rows `output` of a weight: (ROWS, OUTPUTS) in float32."""
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        value = tl.load(x + source[:, None] * c + channel, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(gains + channel, mask=channel < c, other=0.0).to(tl.float32)
        shift = tl.load(shifts + channel, mask=channel < c, other=0.0).to(tl.float32)
        value = (value - mean[:, None]) * rstd[:, None] * gain + shift
        w = tl.load(weight + output[:, None] * c + channel, mask=exists[:, None] & (channel < c), other=0.0)
        sums = tl.dot(value.to(w.dtype), tl.trans(w), sums, input_precision=PRECISION)
    return sums

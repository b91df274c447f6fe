"""The table rotation of neighbouring pairs inside kernels: x cos + R(x) sin, where R takes (a, b) to (-b, a).

A pair lies in the registers of one thread: both in loaded tiles and in accumulators of products, a thread holds at
least two neighbours of the last axis. So splitting and joining pairs moves nothing, nor does the sum over a pair.

The sum is there for the compiler. If the halves were multiplied instead, it would convert the operand's layout before
the rotation. On sm_80 and sm_120 every warp would then rotate each key four times, with spilled registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pairs(x):
    """(ROWS, WIDTH) -> the even columns and the odd ones, (ROWS, WIDTH / 2) each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def from_pairs(even, odd):
    """The inverse of `pairs`."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def rotate(x, sin, cos):
    """x and its tables: float32, (ROWS, WIDTH) -> float32."""
    x = tl.reshape(x.to(tl.float32), (x.shape[0], x.shape[1] // 2, 2))
    sin_a, sin_b = pairs(sin)
    cos_a, cos_b = pairs(cos)
    return from_pairs(tl.sum(x * tl.join(cos_a, -sin_a), 2), tl.sum(x * tl.join(sin_b, cos_b), 2))


@triton.jit
def rotate_back(gradient, sin, cos):
    """The gradient of `rotate`'s input from that of its output, float32: the transposed rotation."""
    gradient = tl.reshape(gradient, (gradient.shape[0], gradient.shape[1] // 2, 2))
    sin_a, sin_b = pairs(sin)
    cos_a, cos_b = pairs(cos)
    return from_pairs(tl.sum(gradient * tl.join(cos_a, sin_b), 2), tl.sum(gradient * tl.join(-sin_a, cos_b), 2))

"""Shared by the attention kernels: how tiles are addressed, scores, the online softmax, and its gradient.

Scores are in base 2: they include `scale` times LOG2_E, so a weight is one exp2. Rows with scores that aren't finite
give what softmax gives: NaN if all are -inf, or if one is +inf or NaN. A single -inf has the weight 0.

Errors of the gradients. With 16-bit values, delta (the mean of the weights' gradients) comes from the stored output,
rounded to 2^-9. So dq is off by up to 2^-9 |grad . out| |mean key| scale, and dk likewise with queries. Where one
weight is nearly 1 the exact gradient vanishes, and only this error is left. At scores of 1e4 it is as large as
gradients are elsewhere. The log-sum-exp is one float32, so weights have a relative error of 6e-8 times the scores'
size. `axial_attention_short` holds all weights of a row and sums delta from them: it has neither error.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.math import sum_of_products

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
WIDEST = 256  # head size: with wider heads, a block's rows don't fit a multiprocessor


def refuse_width(width: int) -> str | None:
    """Why the kernels don't take heads of `width` channels, with the remedy, or None."""
    if width > WIDEST:
        return f"it takes heads of at most {WIDEST} channels, not {width}: use more heads, or another backend."
    return None


def strides_of(x: Tensor) -> tuple[int, ...]:
    """The strides of x except the last, whose values are dense. One argument of a kernel."""
    return tuple(x.stride()[:-1])


def padded(width: int) -> int:
    """The width of a kernel's tile for heads of `width`: a power of two that tensor cores take."""
    return max(16, int(triton.next_power_of_2(width)))


def width_class(width: int) -> str:
    """The part of a shape class that says how wide heads are: "d32" (at most 32), "d64", "d128" or "d256"."""
    return f"d{max(32, padded(width))}"


@triton.jit
def sequence_offset(sequence, head, sites, strides):
    """Elements before the first row of this sequence (numbered through B x sites) and head."""
    batch, site = sequence // sites, sequence % sites
    return batch.to(tl.int64) * strides[0] + site.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[3]


@triton.jit
def load_rows(
    base, first, end, stride, head, ROWS: tl.constexpr, WIDTH: tl.constexpr, DENSE: tl.constexpr, EVEN: tl.constexpr
):
    """(ROWS, WIDTH): rows `first`... of a matrix. Zeros from row `end` on and from column `head` on.

    EVEN: no row reaches `end`. DENSE: WIDTH is `head`. Both save a mask.
    """
    rows, columns = first + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if EVEN and DENSE:
        tile = tl.load(pointers)
    elif EVEN:
        tile = tl.load(pointers, mask=(columns < head)[None, :], other=0.0)
    elif DENSE:
        tile = tl.load(pointers, mask=(rows < end)[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=(rows < end)[:, None] & (columns < head)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(base, first, end, stride, tile, HEAD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_rows`, in the dtype of `base`."""
    rows, columns = first + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = (rows < end)[:, None] & (columns < HEAD)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def scores_by_chunks(
    a_base, a_first, a_stride, b_base, b_first, b_stride, end,
    HEAD: tl.constexpr, ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(ROWS_A, ROWS_B): rows of a times rows of b. Takes CHUNK columns at a time, each loaded when it is used.

    For wide heads in float32: whole rows that stay in registers over the outer loop would not fit.
    """
    products = tl.zeros((ROWS_A, ROWS_B), tl.float32)
    for column in tl.range(0, WIDTH, CHUNK, loop_unroll_factor=1):
        a = load_rows(a_base + column, a_first, end, a_stride, HEAD - column, ROWS_A, CHUNK, HEAD == WIDTH, EVEN)
        b = load_rows(b_base + column, b_first, end, b_stride, HEAD - column, ROWS_B, CHUNK, HEAD == WIDTH, EVEN)
        products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
    return products


@triton.jit
def no_softmax(ROWS: tl.constexpr):
    """The start of `softmax_step`: the highest score and the total weight of each row."""
    return tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)


@triton.jit
def softmax_step(scores, scale, highest, total, KEYS: tl.constexpr):
    """One step of the online softmax of `scale` times scores. Axis KEYS of the scores runs over keys.

    Returns: this step's weights, the factor for earlier sums, the new highest score and total weight.
    """
    higher = tl.maximum(highest, tl.max(scores, KEYS) * scale)
    base = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet: every weight is 0, not inf - inf
    weights = tl.exp2(scores * scale - tl.expand_dims(base, KEYS))
    decay = tl.exp2(highest - base)
    return weights, decay, higher, total * decay + tl.sum(weights, KEYS)


@triton.jit
def log_sum_exp(highest, total):
    """The log-sum-exp of the scores, in base e."""
    return (highest + tl.log2(total)) * LN_2


@triton.jit
def delta_of(grad, out):
    """For each row, the mean of the weights' gradients, weighted by the weights: rowsum(grad . out)."""
    return sum_of_products(grad.to(tl.float32), out.to(tl.float32), 1)


@triton.jit
def where_present(values, present, other, EVEN: tl.constexpr):
    """`values`, or `other` where not `present`. EVEN: all are present, and there is no test."""
    if EVEN:
        return values
    else:
        return tl.where(present, values, other)

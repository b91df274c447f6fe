"""What the attention kernels share: how tiles are addressed, scores, the online softmax, and its gradient.

Scores are in base 2: `scale` times LOG2_E is in them, so that a weight is one exp2. Rows whose scores aren't finite
give what softmax gives: NaN where all are -inf or one is +inf or NaN; a single -inf has the weight 0.

Errors of the gradients. With 16-bit values, delta (the mean of the weights' gradients) is taken from the output as it
was stored, rounded to 2^-9: dq is off by up to 2^-9 |grad . out| |mean key| scale, and dk alike with queries. Where
one weight is nearly 1 the exact gradient vanishes, and this is all there is: at scores of 1e4 it is as large as
gradients are elsewhere. The log-sum-exp is one float32: the weights' relative error is 6e-8 times the scores' size.
`axial_attention_short` has all of a row's weights, sums delta from them, and has neither error.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.math import sum_of_products

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
WIDEST = 256  # head size: a block's rows of wider ones leave no room in a multiprocessor


def refuse_width(width: int) -> str | None:
    """Why heads of `width` channels are beyond the kernels, with the remedy; None where they aren't."""
    if width > WIDEST:
        return f"it takes heads of at most {WIDEST} channels, not {width}: use more heads, or another backend."
    return None


def strides_of(x: Tensor) -> tuple[int, ...]:
    """The strides of x but the last, whose values are dense: as one argument of a kernel."""
    return tuple(x.stride()[:-1])


def padded(width: int) -> int:
    """How wide a kernel's tile is for heads of `width`: a power of two that the tensor cores take."""
    return max(16, int(triton.next_power_of_2(width)))


def width_class(width: int) -> str:
    """The part of a shape class that says how wide heads are: "d32" (at most 32), "d64", "d128" or "d256"."""
    return f"d{max(32, padded(width))}"


@triton.jit
def sequence_offset(sequence, head, sites, strides):
    """Elements from the first row of all to the first of this sequence (a number of B x sites) and head."""
    batch, site = sequence // sites, sequence % sites
    return batch.to(tl.int64) * strides[0] + site.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[3]


@triton.jit
def load_rows(
    base, first, end, stride, head, ROWS: tl.constexpr, WIDTH: tl.constexpr, DENSE: tl.constexpr, EVEN: tl.constexpr
):
    """(ROWS, WIDTH): rows `first`... of a matrix; zeros from row `end` on (EVEN: there are none) and from column `head`
    on, which WIDTH pads (DENSE: there are none)."""
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
    """(ROWS_A, ROWS_B): rows of a times rows of b, CHUNK columns at a time, each loaded when it is used.

    For wide heads in float32: whole rows as operands that stay over the loop around this would not fit the registers.
    """
    products = tl.zeros((ROWS_A, ROWS_B), tl.float32)
    for column in tl.range(0, WIDTH, CHUNK, loop_unroll_factor=1):
        a = load_rows(a_base + column, a_first, end, a_stride, HEAD - column, ROWS_A, CHUNK, HEAD == WIDTH, EVEN)
        b = load_rows(b_base + column, b_first, end, b_stride, HEAD - column, ROWS_B, CHUNK, HEAD == WIDTH, EVEN)
        products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
    return products


@triton.jit
def no_softmax(ROWS: tl.constexpr):
    """What `softmax_step` starts from: the highest score and the total weight of each row."""
    return tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)


@triton.jit
def softmax_step(scores, scale, highest, total, KEYS: tl.constexpr):
    """One step of the online softmax of `scale` times scores, whose axis KEYS runs over keys.

    Returns: this step's weights, by how much earlier sums decay, and the new highest score and total weight.
    """
    higher = tl.maximum(highest, tl.max(scores, KEYS) * scale)
    base = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet: every weight 0, instead of inf - inf
    weights = tl.exp2(scores * scale - tl.expand_dims(base, KEYS))
    decay = tl.exp2(highest - base)
    return weights, decay, higher, total * decay + tl.sum(weights, KEYS)


@triton.jit
def log_sum_exp(highest, total):
    """Of the scores in base e."""
    return (highest + tl.log2(total)) * LN_2


@triton.jit
def delta_of(grad, out):
    """The mean of each row's gradients of weights, weighted by them: rowsum(grad . out)."""
    return sum_of_products(grad.to(tl.float32), out.to(tl.float32), 1)


@triton.jit
def where_present(values, present, other, EVEN: tl.constexpr):
    """`values`, or `other` where not `present`. EVEN: all are, and nothing is asked."""
    if EVEN:
        return values
    else:
        return tl.where(present, values, other)

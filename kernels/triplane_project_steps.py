"""The steps that take a tile of sequences through the layers of `triplane_project`, shared by both directions.

What one step hands to the next lies in memory of the program's own. Each step ends with a barrier of the program's
threads, after which they see each other's values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pvdm_fast.kernels.attention_common import LOG2_E, padded
from pvdm_fast.kernels.math import normal, sum_of_products

# Channels in a step of `attend`, by the bytes of a value: operands in float32 without TF32 are held in registers.
MOST_OF_A_HEAD = {4: 16, 2: 64}


def width_of_a_step(head_width: int, dtype: torch.dtype) -> int:
    """The WIDTH with which to call `attend`."""
    return min(MOST_OF_A_HEAD[dtype.itemsize], padded(head_width))


@triton.jit
def tile_rows(step, ROWS: tl.constexpr, SPACING: tl.constexpr):
    """ROWS rows of the tile, SPACING apart. `step` is a loop's variable, which is never negative.

    min(step, 0) is 0, but only at run time. Otherwise the compiler computes the addresses of every step before all
    loops, and holds them in registers: some hundred a thread.
    """
    return tl.arange(0, ROWS) * SPACING + tl.minimum(step, 0)


@triton.jit
def product(
    left, rows, limit, weight, output, depth, stride, weight_stride, written,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Rows, `stride` apart, times some outputs of a weight (written, depth), whose rows are `weight_stride` apart:
    (ROWS, OUTPUTS) in float32."""
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, depth, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < depth)
        a = tl.load(left + rows[:, None] * stride + channel, mask=inside, other=0.0)
        inside = (output < written)[:, None] & (channel < depth)
        w = tl.load(weight + output[:, None] * weight_stride + channel, mask=inside, other=0.0)
        sums = tl.dot(a, tl.trans(w), sums, input_precision=PRECISION)
    return sums


@triton.jit
def norm(
    stream, narrow, rows, places, limit, weight, bias, hats, rstds, eps, c, narrow_stride,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """LayerNorm of rows of the stream, to rows `places` of `narrow`. The variance is summed in a pass of its own,
    around the mean.

    With `hats` it also keeps, at the same places, what weight and bias are applied to, and 1 / std in `rstds`.
    """
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        total += tl.sum(tl.load(stream + rows[:, None] * c + channel, mask=inside, other=0.0), 1)
    mean = total / c
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        value = tl.load(stream + rows[:, None] * c + channel, mask=inside, other=0.0)
        value = tl.where(inside, value - mean[:, None], 0.0)
        total += sum_of_products(value, value, 1)
    rstd = tl.rsqrt(total / c + eps)
    if hats is not None:
        tl.store(rstds + places, rstd, mask=rows < limit)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        value = tl.load(stream + rows[:, None] * c + channel, mask=inside, other=0.0)
        gain = tl.load(weight + channel, mask=channel < c, other=0.0).to(tl.float32)
        shift = tl.load(bias + channel, mask=channel < c, other=0.0).to(tl.float32)
        hat = (value - mean[:, None]) * rstd[:, None]
        if hats is not None:
            tl.store(hats + places[:, None] * c + channel, hat.to(hats.dtype.element_ty), mask=inside)
        normed = hat * gain + shift
        tl.store(narrow + places[:, None] * narrow_stride + channel, normed.to(narrow.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def widen(
    narrow, wide, limit, weight, bias, c, written, narrow_stride, wide_stride, PRECISION: tl.constexpr,
    SPACING: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """wide = narrow weight'. With a bias: GELU of the sum."""
    for first in tl.range(0, written, OUTPUTS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, SPACING)
        output = first + tl.arange(0, OUTPUTS)
        sums = product(
            narrow, rows, limit, weight, output, c, narrow_stride, c, written, PRECISION, ROWS, OUTPUTS, CHANNELS
        )  # fmt: skip
        if bias is not None:
            sums += tl.load(bias + output, mask=output < written, other=0.0).to(tl.float32)[None, :]
            cdf, _ = normal(sums)
            sums *= cdf
        inside = (rows < limit)[:, None] & (output < written)[None, :]
        tl.store(wide + rows[:, None] * wide_stride + output[None, :], sums.to(wide.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def add(
    left, stream, left_limit, limit, weight, bias, depth, stride, weight_stride, c, PRECISION: tl.constexpr,
    LEFT: tl.constexpr, SPACING: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """stream += left weight' + bias, if there is one, of rows LEFT apart to rows SPACING apart."""
    for first in tl.range(0, c, OUTPUTS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, SPACING)
        output = first + tl.arange(0, OUTPUTS)
        sums = product(
            left, tile_rows(first, ROWS, LEFT), left_limit, weight, output, depth, stride, weight_stride, c,
            PRECISION, ROWS, OUTPUTS, CHANNELS,
        )  # fmt: skip
        if bias is not None:
            sums += tl.load(bias + output, mask=output < c, other=0.0).to(tl.float32)[None, :]
        inside = (rows < limit)[:, None] & (output < c)[None, :]
        place = stream + rows[:, None] * c + output[None, :]
        tl.store(place, sums + tl.load(place, mask=inside, other=0.0), mask=inside)
    tl.debug_barrier()


@triton.jit
def attend(
    wide, narrow, limit, scale, heads, head_width, narrow_stride, wide_stride,
    PRECISION: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Attention inside every LENGTH rows, from `wide` (q | k | v) to `narrow`.

    BLOCK: rows at a time, of whole sequences. WIDTH: channels of a head at a time.
    """
    OWN: tl.constexpr = BLOCK // LENGTH * LENGTH
    BLOCKS: tl.constexpr = (ROWS // LENGTH * LENGTH + OWN - 1) // OWN
    for number in tl.range(0, heads * BLOCKS, num_stages=1, disable_licm=True):
        head = number // BLOCKS
        place = tile_rows(number, BLOCK, 1)
        rows = number % BLOCKS * OWN + place
        exists = (place < OWN) & (rows < limit)
        queries = wide + rows[:, None] * wide_stride + head * head_width
        scores = tl.zeros((BLOCK, BLOCK), tl.float32)
        for first in tl.range(0, head_width, WIDTH, num_stages=1):
            channel = first + tl.arange(0, WIDTH)[None, :]
            inside = exists[:, None] & (channel < head_width)
            q = tl.load(queries + channel, mask=inside, other=0.0)
            k = tl.load(queries + heads * head_width + channel, mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        # Rows that don't exist are sequences of zeros, so that every row has a finite maximum.
        own = (place // LENGTH)[:, None] == (place // LENGTH)[None, :]
        scores = tl.where(own, scores * (scale * LOG2_E), float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(weights, 1)
        weights = weights.to(wide.dtype.element_ty)
        for first in tl.range(0, head_width, WIDTH, num_stages=1):
            channel = first + tl.arange(0, WIDTH)[None, :]
            inside = exists[:, None] & (channel < head_width)
            v = tl.load(queries + 2 * heads * head_width + channel, mask=inside, other=0.0)
            sums = tl.dot(weights, v, input_precision=PRECISION) / total[:, None]
            target = narrow + rows[:, None] * narrow_stride + head * head_width + channel
            tl.store(target, sums.to(narrow.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def rest_of_layer(
    stream, narrow, wide, step, limit, out_weight, out_bias, norm_weight, norm_bias, up_weight, up_bias, down_weight,
    down_bias, layer, eps, c, width, hidden, narrow_stride, wide_stride, PRECISION: tl.constexpr,
    SPACING: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What follows attention: output projection, norm, feed-forward, and both residuals."""
    of_c = layer * c
    add(
        narrow, stream, limit, limit, out_weight + of_c * width, out_bias + of_c, width, narrow_stride,
        width, c, PRECISION, SPACING, SPACING, ROWS, OUTPUTS, CHANNELS,
    )  # fmt: skip
    rows = tile_rows(step, ROWS, SPACING)
    norm(
        stream, narrow, rows, rows, limit, norm_weight + of_c, norm_bias + of_c, None, None, eps, c, narrow_stride,
        ROWS, CHANNELS,
    )  # fmt: skip
    widen(
        narrow, wide, limit, up_weight + of_c * hidden, up_bias + layer * hidden, c, hidden, narrow_stride, wide_stride,
        PRECISION, SPACING, ROWS, OUTPUTS, CHANNELS,
    )  # fmt: skip
    add(
        wide, stream, limit, limit, down_weight + of_c * hidden, down_bias + of_c, hidden, wide_stride,
        hidden, c, PRECISION, SPACING, SPACING, ROWS, OUTPUTS, CHANNELS,
    )  # fmt: skip


@triton.jit
def gather(
    x, token, positions, stream, rows, limit, source, c, LENGTH: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The tile's sequences, to the stream: lattice tokens, the appended token, and their positions."""
    element = rows % LENGTH
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        of_lattice = inside & (element < LENGTH - 1)[:, None]
        value = tl.load(x + source[:, None] + channel, mask=of_lattice, other=0.0).to(tl.float32)
        appended = inside & (element == LENGTH - 1)[:, None]
        value += tl.load(token + channel, mask=appended, other=0.0).to(tl.float32)
        value += tl.load(positions + element[:, None] * c + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(stream + rows[:, None] * c + channel, value, mask=inside)
    tl.debug_barrier()

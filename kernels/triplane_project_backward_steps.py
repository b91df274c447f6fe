"""The steps of a tile on its way back through the layers of `triplane_project`, and what it keeps on its way forth.

Written like those of `triplane_project_steps.py`: each ends with a barrier of the program's threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pvdm_fast.kernels.attention_common import LOG2_E
from pvdm_fast.kernels.math import normal, rounded_product, sum_of_products, tanh
from pvdm_fast.kernels.triplane_project_steps import add, norm, product, tile_rows, widen


@triton.jit
def product_back(
    left, rows, limit, weight, output, depth, stride, written,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Rows, `stride` apart, times some columns of a weight (depth, written): (ROWS, OUTPUTS) in float32."""
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, depth, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = (rows < limit)[:, None] & (channel < depth)[None, :]
        a = tl.load(left + rows[:, None] * stride + channel[None, :], mask=inside, other=0.0)
        inside = (channel < depth)[:, None] & (output < written)[None, :]
        w = tl.load(weight + channel[:, None] * written + output[None, :], mask=inside, other=0.0)
        sums = tl.dot(a, w, sums, input_precision=PRECISION)
    return sums


@triton.jit
def through(
    left, to, copy, limit, weight, depth, written, stride, to_stride,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """to = left weight, the gradient of a product's input. With `copy`, also there, rows `written` apart."""
    for first in tl.range(0, written, OUTPUTS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        output = first + tl.arange(0, OUTPUTS)
        sums = product_back(
            left, rows, limit, weight, output, depth, stride, written, PRECISION, ROWS, OUTPUTS, CHANNELS
        )  # fmt: skip
        inside = (rows < limit)[:, None] & (output < written)[None, :]
        tl.store(to + rows[:, None] * to_stride + output[None, :], sums.to(to.dtype.element_ty), mask=inside)
        if copy is not None:
            tl.store(copy + rows[:, None] * written + output[None, :], sums.to(copy.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def hidden_back(
    narrow, flowing, dhidden, limit, up_weight, up_bias, down_weight, c, hidden, narrow_stride,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dhidden from `flowing`, the gradient of the feed-forward's result. The hidden layer is computed again.

    First the slope of GELU goes to dhidden: held through the second product it would take too many registers.
    """
    for first in tl.range(0, hidden, OUTPUTS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        output = first + tl.arange(0, OUTPUTS)
        sums = product(
            narrow, rows, limit, up_weight, output, c, narrow_stride, c, hidden, PRECISION, ROWS, OUTPUTS, CHANNELS
        )  # fmt: skip
        sums += tl.load(up_bias + output, mask=output < hidden, other=0.0).to(tl.float32)[None, :]
        cdf, density = normal(sums)
        inside = (rows < limit)[:, None] & (output < hidden)[None, :]
        target = dhidden + rows[:, None] * hidden + output[None, :]
        tl.store(target, (cdf + sums * density).to(dhidden.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    for first in tl.range(0, hidden, OUTPUTS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        output = first + tl.arange(0, OUTPUTS)
        sums = product_back(
            flowing, rows, limit, down_weight, output, c, c, hidden, PRECISION, ROWS, OUTPUTS, CHANNELS
        )  # fmt: skip
        inside = (rows < limit)[:, None] & (output < hidden)[None, :]
        target = dhidden + rows[:, None] * hidden + output[None, :]
        sums *= tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, sums.to(dhidden.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def again(
    hats, narrow, step, limit, weight, bias, c, narrow_stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """A norm's result again, to `narrow`."""
    rows = tile_rows(step, ROWS, 1)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        hat = tl.load(hats + rows[:, None] * c + channel, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(weight + channel, mask=channel < c, other=0.0).to(tl.float32)
        shift = tl.load(bias + channel, mask=channel < c, other=0.0).to(tl.float32)
        normed = hat * gain + shift
        tl.store(narrow + rows[:, None] * narrow_stride + channel, normed.to(narrow.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def norm_back(
    dnormed, hats, rstds, stream, copy, copied, step, limit, weight, weight_sums, bias_sums, c,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """stream += the gradient of a norm's input, and where `copied` a copy of it. Adds to the parameters' sums."""
    rows = tile_rows(step, ROWS, 1)
    average = tl.zeros((ROWS,), tl.float32)
    slope = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        place = rows[:, None] * c + channel[None, :]
        inside = (rows < limit)[:, None] & (channel < c)[None, :]
        g = tl.load(dnormed + place, mask=inside, other=0.0)
        hat = tl.load(hats + place, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(weight + channel, mask=channel < c, other=0.0).to(tl.float32)
        total = tl.load(weight_sums + channel, mask=channel < c, other=0.0)
        tl.store(weight_sums + channel, total + sum_of_products(g, hat, 0), mask=channel < c)
        total = tl.load(bias_sums + channel, mask=channel < c, other=0.0)
        tl.store(bias_sums + channel, total + tl.sum(g, 0), mask=channel < c)
        g = rounded_product(g, gain[None, :])
        average += tl.sum(g, 1)
        slope += sum_of_products(g, hat, 1)
    average, slope = average / c, slope / c
    rstd = tl.load(rstds + rows, mask=rows < limit, other=0.0)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        place = rows[:, None] * c + channel[None, :]
        inside = (rows < limit)[:, None] & (channel < c)[None, :]
        g = tl.load(dnormed + place, mask=inside, other=0.0)
        hat = tl.load(hats + place, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(weight + channel, mask=channel < c, other=0.0).to(tl.float32)
        g = rstd[:, None] * (g * gain[None, :] - average[:, None] - hat * slope[:, None])
        g += tl.load(stream + place, mask=inside, other=0.0)
        tl.store(stream + place, g, mask=inside)
        tl.store(copy + place, g.to(copy.dtype.element_ty), mask=inside & copied)
    tl.debug_barrier()


@triton.jit
def attend_back(
    wide, narrow, dqkv, limit, scale, last, heads, head_width, narrow_stride, wide_stride,
    PRECISION: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dqkv from `narrow`, the gradient of what was attended to. In the last layer that has one row for each sequence:
    the gradient of its element 0.

    BLOCK: rows at a time, of whole sequences. Weights and their gradients are held in float32, (BLOCK, BLOCK) each.
    """
    OWN: tl.constexpr = BLOCK // LENGTH * LENGTH
    BLOCKS: tl.constexpr = (ROWS // LENGTH * LENGTH + OWN - 1) // OWN
    for number in tl.range(0, heads * BLOCKS, num_stages=1, disable_licm=True):
        head = number // BLOCKS
        place = tile_rows(number, BLOCK, 1)
        rows = number % BLOCKS * OWN + place
        exists = (place < OWN) & (rows < limit)
        given = exists & ((rows % LENGTH == 0) | (last == 0))
        incoming = narrow + tl.where(last != 0, rows // LENGTH, rows)[:, None] * narrow_stride + head * head_width
        queries = wide + rows[:, None] * wide_stride + head * head_width
        scores = tl.zeros((BLOCK, BLOCK), tl.float32)
        dweights = tl.zeros((BLOCK, BLOCK), tl.float32)
        for first in tl.range(0, head_width, WIDTH, num_stages=1):
            channel = first + tl.arange(0, WIDTH)[None, :]
            inside = exists[:, None] & (channel < head_width)
            q = tl.load(queries + channel, mask=inside, other=0.0)
            k = tl.load(queries + heads * head_width + channel, mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
            d = tl.load(incoming + channel, mask=given[:, None] & (channel < head_width), other=0.0)
            v = tl.load(queries + 2 * heads * head_width + channel, mask=inside, other=0.0)
            dweights = tl.dot(d, tl.trans(v), dweights, input_precision=PRECISION)
        # Rows that don't exist are sequences of zeros, so that every row has a finite maximum.
        own = (place // LENGTH)[:, None] == (place // LENGTH)[None, :]
        scores = tl.where(own, scores * (scale * LOG2_E), float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        dweights -= sum_of_products(weights, dweights, 1)[:, None]
        dscores = tl.where(own, weights * dweights, 0.0).to(wide.dtype.element_ty)
        weights = weights.to(wide.dtype.element_ty)
        for first in tl.range(0, head_width, WIDTH, num_stages=1):
            channel = first + tl.arange(0, WIDTH)[None, :]
            inside = exists[:, None] & (channel < head_width)
            target = dqkv + rows[:, None] * (3 * heads * head_width) + head * head_width + channel
            k = tl.load(queries + heads * head_width + channel, mask=inside, other=0.0)
            dq = tl.dot(dscores, k, input_precision=PRECISION) * scale
            tl.store(target, dq.to(dqkv.dtype.element_ty), mask=inside)
            q = tl.load(queries + channel, mask=inside, other=0.0)
            dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION) * scale
            tl.store(target + heads * head_width, dk.to(dqkv.dtype.element_ty), mask=inside)
            d = tl.load(incoming + channel, mask=given[:, None] & (channel < head_width), other=0.0)
            dv = tl.dot(tl.trans(weights), d, input_precision=PRECISION)
            tl.store(target + 2 * heads * head_width, dv.to(dqkv.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def rest_of_layer_kept(
    stream, narrow, attended, hat, rstd, gelu, step, limit, count, out_weight, out_bias, norm_weight, norm_bias,
    up_weight, up_bias, down_weight, down_bias, eps, c, width, hidden, narrow_stride,
    PRECISION: tl.constexpr, SPACING: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`rest_of_layer`, keeping what the backward pass needs. All pointers are those of this layer.

    Of `stream` and `attended` it takes rows SPACING apart, `count` of them. The others have only those.
    """
    add(
        attended, stream, limit, limit, out_weight, out_bias, width, width, width, c,
        PRECISION, SPACING, SPACING, ROWS, OUTPUTS, CHANNELS,
    )  # fmt: skip
    norm(
        stream, narrow, tile_rows(step, ROWS, SPACING), tile_rows(step, ROWS, 1), limit, norm_weight, norm_bias,
        hat, rstd, eps, c, narrow_stride, ROWS, CHANNELS,
    )  # fmt: skip
    widen(
        narrow, gelu, count, up_weight, up_bias, c, hidden, narrow_stride, hidden,
        PRECISION, 1, ROWS, OUTPUTS, CHANNELS,
    )  # fmt: skip
    add(
        gelu, stream, count, limit, down_weight, down_bias, hidden, hidden, hidden, c,
        PRECISION, 1, SPACING, ROWS, OUTPUTS, CHANNELS,
    )  # fmt: skip


@triton.jit
def latents_back(
    stream, kept, dlatent, flowing, grad, step, sequence, sites, count, grad_batch, grad_site, weight, bias, c, latents,
    latents_stride, PRECISION: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """From `grad`, that of the latents, to that of the last layer's result: the first rows of `stream`, and `flowing`.

    Keeps both sides of the product for the weight's gradient. OUTPUTS: latents at a time. BLOCK: channels written.
    """
    rows = tile_rows(step, ROWS, 1)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < count)[:, None] & (channel < c)
        value = tl.load(stream + rows[:, None] * (LENGTH * c) + channel, mask=inside, other=0.0)
        tl.store(kept + rows[:, None] * c + channel, value.to(kept.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    sequence = (sequence + tl.arange(0, ROWS)).to(tl.int64)
    incoming = grad + sequence // sites * grad_batch + sequence % sites * grad_site
    for first in tl.range(0, latents, OUTPUTS, num_stages=1, disable_licm=True):
        output = first + tl.arange(0, OUTPUTS)
        sums = product(kept, rows, count, weight, output, c, c, c, latents, PRECISION, ROWS, OUTPUTS, CHANNELS)
        sums += tl.load(bias + output, mask=output < latents, other=0.0).to(tl.float32)[None, :]
        inside = (rows < count)[:, None] & (output < latents)[None, :]
        g = tl.load(incoming[:, None] + output[None, :], mask=inside, other=0.0).to(tl.float32)
        latent = tanh(sums)
        target = dlatent + rows[:, None] * latents_stride + output[None, :]
        tl.store(target, (g * (1.0 - latent * latent)).to(dlatent.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    through(
        dlatent, stream, flowing, count, weight, latents, c, latents_stride, c, PRECISION, ROWS, BLOCK, OUTPUTS
    )  # fmt: skip


@triton.jit
def feed_forward_back(
    stream, narrow, dnormed, hat, rstd, flowing, dhidden, dtotal, step, count, norm_weight, norm_bias, up_weight,
    up_bias, down_weight, weight_sums, bias_sums, c, hidden, narrow_stride,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Back through a feed-forward, its norm and its residual. `dtotal`: the residual sum's gradient, as is `stream`."""
    again(hat, narrow, step, count, norm_weight, norm_bias, c, narrow_stride, ROWS, CHANNELS)
    hidden_back(
        narrow, flowing, dhidden, count, up_weight, up_bias, down_weight, c, hidden, narrow_stride,
        PRECISION, ROWS, OUTPUTS, CHANNELS,
    )  # fmt: skip
    through(
        dhidden, dnormed, None, count, up_weight, hidden, c, hidden, c, PRECISION, ROWS, OUTPUTS, CHANNELS
    )  # fmt: skip
    norm_back(
        dnormed, hat, rstd, stream, dtotal, True, step, count, norm_weight, weight_sums, bias_sums, c, ROWS, CHANNELS
    )  # fmt: skip


@triton.jit
def spread(stream, limit, c, LENGTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows of `stream`, one for each sequence, become those of element 0. The other elements' are zero."""
    for first in tl.range(0, c, CHANNELS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        of_first = inside & (rows % LENGTH == 0)[:, None]
        value = tl.load(stream + (rows // LENGTH)[:, None] * c + channel, mask=of_first, other=0.0)
        tl.debug_barrier()
        tl.store(stream + rows[:, None] * c + channel, value, mask=inside)
        tl.debug_barrier()


@triton.jit
def scatter(
    stream, dx, positions_sums, first_sequence, limit, sites, inner, outer_step, step, tokens, c, KIND: tl.constexpr,
    PRECISION: tl.constexpr, LENGTH: tl.constexpr, ELEMENTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of the sequences, to dx. Adds to the sums of the positions' (that of the token is the last one).

    Sums over sequences are a product with ones, of values in KIND. ELEMENTS: LENGTH, padded.
    """
    for first in tl.range(0, c, CHANNELS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        sequence = first_sequence + rows // LENGTH
        site = sequence % sites
        target = (sequence // sites).to(tl.int64) * tokens
        target += site // inner * outer_step + site % inner + rows % LENGTH * step
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        value = tl.load(stream + rows[:, None] * c + channel, mask=inside, other=0.0)
        of_lattice = inside & (rows % LENGTH < LENGTH - 1)[:, None]
        tl.store(dx + target[:, None] * c + channel, value.to(dx.dtype.element_ty), mask=of_lattice)
    for first in tl.range(0, c, CHANNELS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        value = tl.load(stream + rows[:, None] * c + channel, mask=inside, other=0.0)
        element = tl.arange(0, ELEMENTS)
        ones = tl.where(element[:, None] == (rows % LENGTH)[None, :], 1.0, 0.0).to(KIND)
        place = positions_sums + element[:, None] * c + channel
        inside = (element < LENGTH)[:, None] & (channel < c)
        total = tl.load(place, mask=inside, other=0.0)
        total += tl.dot(ones, value.to(KIND), input_precision=PRECISION)
        tl.store(place, total, mask=inside)
    tl.debug_barrier()

"""Gradients of `plane_conv`. That of x is the mirrored convolution, that of the weight a product along the tokens.

The inner axis of the weight's gradient are the rows (B N). If there are few tiles, programs share this axis. Their
parts are added in order, and the result is written in the weight's own order of memory. The last of the
programs of a tile, of all taps and parts, does so if it has little to read (`arrivals.py`), otherwise a second kernel.
The gradient of the bias, a sum over the same rows, is made by both on their way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.rows import order_of
from pvdm_fast.kernels.arrivals import counters_for, is_last
from pvdm_fast.kernels.configs import ANY, ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import dot_precision
from pvdm_fast.kernels.plane_conv_product import (
    NARROW,
    TAPS,
    convolve,
    convolve_by_vendor,
    packed,
    parts_of,
    readable,
    tile,
    vendor_is_chosen,
)
from pvdm_fast.kernels.planes import place_of


def shape_class(rows: int, channels: int, written: int, dtype: torch.dtype) -> str:
    """The shape class of the weight's gradient: "exact" (float32), "narrow in", "narrow out" (16 channels), "few" (at
    most 2048 rows), "wide"."""
    if dtype == torch.float32:
        return "exact"
    if min(channels, written) <= NARROW:
        return "narrow in" if channels <= NARROW else "narrow out"
    return "few" if rows <= 2048 else "wide"


# BLOCK_M written channels x BLOCK_N channels of x, BLOCK_K rows per step. Shared memory as for the convolution.
# "few" (one clip): tiles of 64 x 64 read twice as much from the L2 as those of 128 x 128. But where programs are fewer
# than multiprocessors, or write more than they multiply, this costs nothing. And the last program of a tile can bring
# all nine taps in order: 74 KB to read, where 128 x 128 have 295. Reasoned, not measured.
WEIGHT = ConfigTable(
    "plane_conv_weight_gradient",
    {
        (ANY, ANY, ANY): tile(128, 128, 64, 8, 3),
        (ANY, "exact", ANY): tile(64, 64, 16, 4, 3),
        (ANY, "few", ANY): tile(64, 64, 64, 8, 3),
        (ANY, "narrow in", ANY): tile(64, 16, 64, 4, 3),
        (ANY, "narrow out", ANY): tile(16, 64, 64, 8, 3),  # 4 warps spill
        ("sm100", "exact", ANY): tile(64, 64, 16, 8, 3),  # 4 warps spill
        ("sm100", "narrow out", ANY): tile(16, 64, 64, 4, 3),  # 8 warps spill
        ("sm100", "few", ANY): tile(64, 64, 64, 4, 3),  # 8 warps spill
        ("sm120", "exact", ANY): tile(64, 64, 16, 8, 3),  # in tf32 4 warps spill
        ("sm120", "wide", ANY): tile(128, 128, 64, 8, 2),
        ("gfx942", "wide", ANY): tile(128, 128, 64, 8, 2),
        ("gfx942", "few", ANY): tile(128, 128, 64, 8, 2),
        ("gfx942", "exact", ANY): tile(64, 64, 16, 4, 2),
        ("gfx942", "narrow in", ANY): tile(64, 16, 64, 4, 2),
        ("gfx942", "narrow out", ANY): tile(16, 64, 64, 4, 2),
        ("interpreter", ANY, ANY): tile(64, 64, 64, 4, 1),
    },
    candidates=tuple(
        tile(m, n, k, warps, stages)
        for m, n, warps in ((64, 64, 4), (128, 64, 4), (128, 128, 8))
        for k in (32, 64)
        for stages in (2, 3, 4)
    ),
)
ARRANGE = ConfigTable(
    "plane_conv_arrange",
    {(ANY, ANY, ANY): Config({"BLOCK_C": 128})},
    candidates=tuple(Config({"BLOCK_C": c}) for c in (64, 256)),
)


@triton.jit
def _arrange(
    parts, out, output, channel, written, channels, count, channel_stride, tap_stride, AT_ONCE: tl.constexpr
):  # fmt: skip
    """out (written, channels, 9)[output, channel] = the sum of parts (count, written, 9, channels), in float32, in
    order. Of out, strides along channels and taps are given: (9, 1), or in channels_last (1, channels)."""
    output, channel, tap = output.to(tl.int64)[:, None, None], channel[None, :, None], tl.arange(0, 16)[None, None, :]
    mask = (output < written) & (channel < channels) & (tap < 9)
    at = parts + (output * 9 + tap) * channels + channel
    total = tl.zeros(mask.shape, tl.float32)
    for first in range(0, count, AT_ONCE):
        for part in tl.static_range(AT_ONCE):
            source = at + tl.cast(first + part, tl.int64) * written * 9 * channels
            here = mask & (first + part < count)
            total += tl.load(source, mask=here, other=0.0, cache_modifier=".cg").to(tl.float32)
    at = out + output * 9 * channels + channel * channel_stride + tap * tap_stride
    tl.store(at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_levels(levels, bias_out, output, written, count):
    """bias_out (written)[output] = the sum of levels (count, written), in order."""
    level = tl.zeros(output.shape, tl.float32)
    for part in range(count):
        level += tl.load(levels + part * written + output, mask=output < written, other=0.0, cache_modifier=".cg")
    tl.store(bias_out + output, level.to(bias_out.dtype.element_ty), mask=output < written)


@triton.jit
def _arrange_tile(
    parts, levels, out, bias_out, counters, written, channels, out_channel, out_tap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ARRANGED: tl.constexpr,
):  # fmt: skip
    """The last program of a tile arranges it, ARRANGED written channels at a time."""
    count = tl.num_programs(2)
    if is_last(counters + tl.program_id(0), tl.num_programs(1) * count):
        across = tl.cdiv(channels, BLOCK_N)
        start = tl.program_id(0) // across * BLOCK_M
        channel = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
        for first in range(0, BLOCK_M, ARRANGED):
            output = start + first + tl.arange(0, ARRANGED)
            _arrange(parts, out, output, channel, written, channels, count, out_channel, out_tap, 1)
        if tl.program_id(0) % across == 0:
            _add_levels(levels, bias_out, start + tl.arange(0, BLOCK_M), written, count)


@triton.jit
def plane_conv_backward_dweight(
    x, grad, parts, levels, out, bias_out, counters, batch_stride, stride, channel_stride, grad_batch_stride,
    grad_stride, grad_channel_stride, rows, channels, written, steps, out_channel, out_tap, PLANES: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ARRANGED: tl.constexpr,
):  # fmt: skip
    """One tile of parts (parts, written, 9, channels): one tap, and one part's `steps` steps of BLOCK_K rows.

    Programs of the middle tap, which lies inside for every row, and of the first channels also write the sums of grad:
    levels (parts, written). They read it again, so that the product's loop stays as it is. counters: of tiles; None:
    another kernel makes out (written, channels, 9) and bias_out (written). out_channel, out_tap: strides of out.
    """
    across = tl.cdiv(channels, BLOCK_N)
    output = (tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    channel = (tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    tap, part = tl.program_id(1), tl.program_id(2)
    down, right = tap // 3 - 1, tap % 3 - 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(rows, BLOCK_K))):
        row = step * BLOCK_K + tl.arange(0, BLOCK_K)
        b, token = (row // TOKENS).to(tl.int64), row % TOKENS
        i, j, height, width = place_of(token, PLANES)
        inside = (row < rows) & (i + down >= 0) & (i + down < height) & (j + right >= 0) & (j + right < width)
        at = (b * grad_batch_stride + token.to(tl.int64) * grad_stride)[:, None]
        mask = inside[:, None] & (output < written)[None, :]
        g = tl.load(grad + at + (output * grad_channel_stride)[None, :], mask=mask, other=0.0)
        at = (b * batch_stride + (token + down * width + right).to(tl.int64) * stride)[:, None]
        mask = inside[:, None] & (channel < channels)[None, :]
        values = tl.load(x + at + (channel * channel_stride)[None, :], mask=mask, other=0.0)
        total = tl.dot(tl.trans(g), values, total, input_precision=PRECISION)
    at = parts + ((part * written + output)[:, None] * 9 + tap) * channels + channel[None, :]
    mask = (output < written)[:, None] & (channel < channels)[None, :]
    tl.store(at, total.to(parts.dtype.element_ty), mask=mask)
    if (tap == 4) & (tl.program_id(0) % across == 0):
        level = tl.zeros([BLOCK_M], tl.float32)
        for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(rows, BLOCK_K))):
            row = step * BLOCK_K + tl.arange(0, BLOCK_K)
            place = (row // TOKENS).to(tl.int64) * grad_batch_stride + (row % TOKENS).to(tl.int64) * grad_stride
            exists = (row < rows)[:, None] & (output < written)[None, :]
            tile = tl.load(grad + place[:, None] + (output * grad_channel_stride)[None, :], mask=exists, other=0.0)
            level += tl.sum(tile.to(tl.float32), 0)
        tl.store(levels + part * written + output, level, mask=output < written)
    if counters is not None:
        _arrange_tile(
            parts, levels, out, bias_out, counters, written, channels, out_channel, out_tap, BLOCK_M, BLOCK_N, ARRANGED
        )  # fmt: skip


@triton.jit
def plane_conv_backward_arrange(
    parts, levels, out, bias_out, written, channels, out_channel, out_tap, COUNT: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """What `_arrange_tile` does, for one written channel and BLOCK_C channels."""
    output = tl.program_id(0) + tl.arange(0, 1)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    _arrange(parts, out, output, channel, written, channels, COUNT, out_channel, out_tap, COUNT)
    if tl.program_id(1) == 0:
        _add_levels(levels, bias_out, output, written, COUNT)


def parameter_gradients(grad: Tensor, x: Tensor, weight: Tensor, planes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of the weight, (C', C, 3, 3), and of the bias, (C'), in the weight's dtype and order of memory."""
    (batch, tokens, channels), written = x.shape, grad.shape[2]
    rows, x, grad = batch * tokens, readable(x), readable(grad)
    config = WEIGHT(x.device, shape_class(rows, channels, written, x.dtype), x.dtype)
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    tiles = triton.cdiv(written, block_m) * triton.cdiv(channels, block_n)
    steps = triton.cdiv(rows, config.blocks["BLOCK_K"])
    count = parts_of(x.device, tiles * TAPS, steps)
    dtype = torch.float32 if count > 1 else weight.dtype
    parts = x.new_empty(count, written, TAPS, channels, dtype=dtype)
    levels = x.new_empty(count, written, dtype=torch.float32)
    results = torch.empty_like(weight, memory_format=order_of(weight)), weight.new_empty(written)
    _, *strides = results[0].view(written, channels, TAPS).stride()
    counters = counters_for(x, tiles, count * TAPS * block_m * block_n * dtype.itemsize)
    launch(
        plane_conv_backward_dweight,
        (tiles, TAPS, count),
        *(x, grad, parts, levels, *((None, None) if counters is None else results), counters),
        *(*x.stride(), *grad.stride(), rows, channels, written, triton.cdiv(steps, count), *strides),
        config=config,
        PLANES=tuple(planes),
        TOKENS=tokens,
        PRECISION=dot_precision(x, "convolution"),
        ARRANGED=max(1, min(block_m, 64 * config.num_warps // block_n)),  # of 16 taps: 32 values a thread
    )
    if counters is None:
        config = ARRANGE(x.device, ANY, x.dtype)
        launch(
            plane_conv_backward_arrange,
            (written, triton.cdiv(channels, config.blocks["BLOCK_C"])),
            *(parts, levels, *results, written, channels, *strides),
            config=config,
            COUNT=count,
        )
    return results


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, planes: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias. Those of x and weight are empty unless `needs` asks for them."""
    grad = grad.to(x.dtype)
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if needs[0] and vendor_is_chosen(grad, x.shape[2]):
        dx = convolve_by_vendor(grad, weight.flip(2, 3).transpose(0, 1), None, planes)
    elif needs[0]:
        dx = convolve(grad, packed(weight), None, planes, mirrored=True)
    if not needs[1]:
        return dx, dweight, grad.sum((0, 1))
    return dx, *parameter_gradients(grad, x, weight, planes)

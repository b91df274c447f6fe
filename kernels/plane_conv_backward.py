"""Gradients of `plane_conv`. That of x is the mirrored convolution, that of the weight a product along the tokens.

The inner axis of the weight's gradient are the rows (B N). If there are few tiles, programs share this axis. A second
kernel adds their parts in order, and writes the result in the weight's own order, with taps innermost. The gradient of
the bias, a sum over the same rows, is made by both on their way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def shape_class(channels: int, written: int, dtype: torch.dtype) -> str:
    """The shape class of the weight's gradient: "exact" (float32), "narrow in", "narrow out" (16 channels), "wide"."""
    if dtype == torch.float32:
        return "exact"
    return "narrow in" if channels <= NARROW else "narrow out" if written <= NARROW else "wide"


# BLOCK_M written channels x BLOCK_N channels of x, BLOCK_K rows per step. Shared memory as for the convolution.
WEIGHT = ConfigTable(
    "plane_conv_weight_gradient",
    {
        (ANY, ANY, ANY): tile(128, 128, 64, 8, 3),
        (ANY, "exact", ANY): tile(64, 64, 16, 4, 3),
        (ANY, "narrow in", ANY): tile(64, 16, 64, 4, 3),
        (ANY, "narrow out", ANY): tile(16, 64, 64, 4, 3),
        ("sm100", "exact", ANY): tile(64, 64, 16, 8, 3),  # 4 warps spill
        ("sm120", "exact", ANY): tile(64, 64, 16, 8, 3),  # in tf32 4 warps spill
        ("sm120", "wide", ANY): tile(128, 128, 64, 8, 2),
        ("gfx942", "wide", ANY): tile(128, 128, 64, 8, 2),
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
def plane_conv_backward_dweight(
    x, grad, parts, levels, batch_stride, stride, channel_stride, grad_batch_stride, grad_stride, grad_channel_stride,
    rows, channels, written, steps, PLANES: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of parts (parts, written, 9, channels): one tap, and one part's `steps` steps of BLOCK_K rows.

    Programs of the middle tap, which lies inside for every row, and of the first channels also write the sums of grad:
    levels (parts, written). They read it again, so that the product's loop stays as it is.
    """
    across = tl.cdiv(channels, BLOCK_N)
    out = (tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
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
        mask = inside[:, None] & (out < written)[None, :]
        g = tl.load(grad + at + (out * grad_channel_stride)[None, :], mask=mask, other=0.0)
        at = (b * batch_stride + (token + down * width + right).to(tl.int64) * stride)[:, None]
        mask = inside[:, None] & (channel < channels)[None, :]
        values = tl.load(x + at + (channel * channel_stride)[None, :], mask=mask, other=0.0)
        total = tl.dot(tl.trans(g), values, total, input_precision=PRECISION)
    at = parts + ((part * written + out)[:, None] * 9 + tap) * channels + channel[None, :]
    mask = (out < written)[:, None] & (channel < channels)[None, :]
    tl.store(at, total.to(parts.dtype.element_ty), mask=mask)
    if (tap == 4) & (tl.program_id(0) % across == 0):
        level = tl.zeros([BLOCK_M], tl.float32)
        for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(rows, BLOCK_K))):
            row = step * BLOCK_K + tl.arange(0, BLOCK_K)
            place = (row // TOKENS).to(tl.int64) * grad_batch_stride + (row % TOKENS).to(tl.int64) * grad_stride
            exists = (row < rows)[:, None] & (out < written)[None, :]
            tile = tl.load(grad + place[:, None] + (out * grad_channel_stride)[None, :], mask=exists, other=0.0)
            level += tl.sum(tile.to(tl.float32), 0)
        tl.store(levels + part * written + out, level, mask=out < written)


@triton.jit
def plane_conv_backward_arrange(
    parts, levels, out, bias_out, written, channels, COUNT: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """out (written, channels, 9) = the sum of parts (COUNT, written, 9, channels), in float32, in order. The same for
    bias_out (written) and levels (COUNT, written)."""
    output, tap = tl.program_id(0).to(tl.int64), tl.arange(0, 16)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (channel < channels)[:, None] & (tap < 9)[None, :]
    at = parts + (output * 9 + tap)[None, :] * channels + channel[:, None]
    total = tl.zeros([BLOCK_C, 16], tl.float32)
    for part in tl.static_range(COUNT):
        total += tl.load(at + tl.full([], part, tl.int64) * written * 9 * channels, mask=mask, other=0.0).to(tl.float32)
    to = out + (output * channels + channel)[:, None] * 9 + tap[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        level = tl.load(levels + output)
        for part in tl.static_range(1, COUNT):
            level += tl.load(levels + part * written + output)
        tl.store(bias_out + output, level.to(bias_out.dtype.element_ty))


def parameter_gradients(grad: Tensor, x: Tensor, weight: Tensor, planes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of the weight, (C', C, 3, 3) contiguous, and of the bias, (C'), in the weight's dtype."""
    (batch, tokens, channels), written = x.shape, grad.shape[2]
    rows, x, grad = batch * tokens, readable(x), readable(grad)
    config = WEIGHT(x.device, shape_class(channels, written, x.dtype), x.dtype)
    tiles = triton.cdiv(written, config.blocks["BLOCK_M"]) * triton.cdiv(channels, config.blocks["BLOCK_N"])
    steps = triton.cdiv(rows, config.blocks["BLOCK_K"])
    parts = parts_of(x.device, tiles * TAPS, steps)
    dtype = torch.float32 if parts > 1 else weight.dtype
    pieces = x.new_empty(parts, written, TAPS, channels, dtype=dtype)
    levels = x.new_empty(parts, written, dtype=torch.float32)
    launch(
        plane_conv_backward_dweight,
        (tiles, TAPS, parts),
        *(x, grad, pieces, levels, *x.stride(), *grad.stride(), rows, channels, written, triton.cdiv(steps, parts)),
        config=config,
        PLANES=tuple(planes),
        TOKENS=tokens,
        PRECISION=dot_precision(x, "convolution"),
    )
    out, bias = weight.new_empty(weight.shape), weight.new_empty(written)
    config = ARRANGE(x.device, ANY, x.dtype)
    launch(
        plane_conv_backward_arrange,
        (written, triton.cdiv(channels, config.blocks["BLOCK_C"])),
        *(pieces, levels, out, bias, written, channels),
        config=config,
        COUNT=parts,
    )
    return out, bias


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

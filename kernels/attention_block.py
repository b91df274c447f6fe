"""The attention blocks, for inference: three launches across planes of few tokens, otherwise four instead of five.

Of up to 128 tokens that all attend to each other:

1. `attention_block_forward_qkv`: GroupNorm in the prologue of the qkv projection. A program holds all tokens and goes
   through the channels by whole groups. So the tile that it multiplies is also all that these groups' statistics need.
2. The flash kernel of `segment_attention`.
3. `attention_block_forward_projection`: the output projection, with bias and residual in the epilogue.

Of more tokens, or inside planes, norm and qkv are `plane_norm` and the vendor's product, and the rest is the same.

Why not one launch? Every output channel needs every head, and every head needs every channel of x. If programs don't
wait for each other (which needs atomics, and all programs on the GPU at once), there can only be one per batch element.
At C 1024 each would read 8 MiB of weights: 75 us at the 110 GB/s of one multiprocessor. At N 128 it would multiply 1.1
GFLOP: about 200 us. The saved launches take 10 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels import plane_norm, segment_attention
from pvdm_fast.kernels.attention_common import refuse_width
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import dot_precision, sum_of_products
from pvdm_fast.layout import PlaneLayout

MOST_TOKENS = 128  # of one program, which holds all
WIDEST_GROUP = 128  # channels: a step holds a whole group of all tokens
# OUTPUTS: output channels per program. At batch 1 and C 1024, 96 programs read the weights of qkv, and 64 those of the
# projection. CHANNELS: per step. Reasoned, not measured.
QKV = ConfigTable(
    "attention_block_qkv",
    {
        ("*", "*", "*"): Config({"OUTPUTS": 32, "CHANNELS": 64}, 8, 2),
        ("*", "*", "float32"): Config({"OUTPUTS": 32, "CHANNELS": 32}, 8, 1),
        ("interpreter", "*", "*"): Config({"OUTPUTS": 64, "CHANNELS": 32}),
    },
    candidates=tuple(
        Config({"OUTPUTS": outputs, "CHANNELS": channels}, warps, 2)
        for outputs in (16, 32, 64)
        for channels in (32, 64, 128)
        for warps in (4, 8)
    ),
)
PROJECTION = ConfigTable(
    "attention_block_projection",
    {
        ("*", "*", "*"): Config({"ROWS": 64, "OUTPUTS": 32, "CHANNELS": 128}, 4, 3),
        ("*", "*", "float32"): Config({"ROWS": 32, "OUTPUTS": 32, "CHANNELS": 32}, 4, 2),
        ("interpreter", "*", "*"): Config({"ROWS": 32, "OUTPUTS": 64, "CHANNELS": 64}),
    },
    candidates=tuple(
        Config({"ROWS": rows, "OUTPUTS": outputs, "CHANNELS": channels}, 4, stages)
        for rows in (16, 32, 64)
        for outputs in (16, 32, 64)
        for channels in (64, 128)
        for stages in (2, 3, 4)
    ),
)


def refusal(*inputs: Any) -> str | None:
    """Why the kernels don't take these arguments, or None."""
    x, heads, groups = inputs[0], inputs[7], inputs[8]
    channels, per_group = x.shape[2], x.shape[2] // groups
    if per_group > WIDEST_GROUP:
        return f"it takes groups of at most {WIDEST_GROUP} channels, not {per_group}: use more groups."
    return refuse_width(channels // heads)


@triton.jit
def attention_block_forward_qkv(
    x, norm_weight, norm_bias, weight, bias, qkv, tokens, eps, stride_batch, stride_token,
    C: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x (B, N, C) by strides -> qkv (B, N, 3 C). Grid: blocks of outputs x B.

    TOKENS: N, padded. WIDTH: channels of a group, padded. A step takes as many groups as fit CHANNELS, but at least
    one.
    """
    STEP: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
    b = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    token, place = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    x_rows = x + b * stride_batch + token.to(tl.int64)[:, None, None] * stride_token
    weight_rows = weight + output.to(tl.int64)[:, None, None] * C
    count = tokens * (C // GROUPS)
    sums = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for first in range(0, GROUPS, STEP):
        group = first + tl.arange(0, STEP)
        channel = group[:, None] * (C // GROUPS) + place[None, :]
        inside = (group < GROUPS)[:, None] & (place < C // GROUPS)[None, :]
        mask = (token < tokens)[:, None, None] & inside[None, :, :]
        values = tl.load(x_rows + channel[None, :, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(values, 2), 0) / count
        deviation = tl.where(mask, values - mean[None, :, None], 0.0)
        variance = tl.sum(sum_of_products(deviation, deviation, 2), 0) / count
        gain = tl.load(norm_weight + channel, mask=inside, other=0.0).to(tl.float32) * tl.rsqrt(variance + eps)[:, None]
        shift = tl.load(norm_bias + channel, mask=inside, other=0.0).to(tl.float32)
        normed = (deviation * gain[None, :, :] + shift[None, :, :]).to(x.dtype.element_ty)
        outside = (output < 3 * C)[:, None, None] & inside[None, :, :]
        w = tl.load(weight_rows + channel[None, :, :], mask=outside, other=0.0)
        normed, w = tl.reshape(normed, (TOKENS, STEP * WIDTH)), tl.reshape(w, (OUTPUTS, STEP * WIDTH))
        sums = tl.dot(normed, tl.trans(w), sums, input_precision=PRECISION)
    sums += tl.load(bias + output, mask=output < 3 * C, other=0.0).to(tl.float32)[None, :]
    to = qkv + (b * tokens + token)[:, None] * (3 * C) + output[None, :]
    tl.store(to, sums.to(qkv.dtype.element_ty), mask=(token < tokens)[:, None] & (output < 3 * C)[None, :])


@triton.jit
def attention_block_forward_projection(
    attended, weight, bias, x, out, rows, tokens, stride_batch, stride_token, C: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = x + attended weight' + bias. Grid: rows x outputs.

    attended and out: (B N, C) contiguous. x: (B, N, C) by strides.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, C, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        at = (row < rows)[:, None] & (channel < C)[None, :]
        a = tl.load(attended + row[:, None] * C + channel[None, :], mask=at, other=0.0)
        at = (output < C)[:, None] & (channel < C)[None, :]
        w = tl.load(weight + output.to(tl.int64)[:, None] * C + channel[None, :], mask=at, other=0.0)
        sums = tl.dot(a, tl.trans(w), sums, input_precision=PRECISION)
    mask = (row < rows)[:, None] & (output < C)[None, :]
    x_rows = x + (row // tokens)[:, None] * stride_batch + (row % tokens)[:, None] * stride_token + output[None, :]
    sums += tl.load(bias + output, mask=output < C, other=0.0).to(tl.float32)[None, :]
    sums += tl.load(x_rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * C + output[None, :], sums.to(out.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    heads: int,
    groups: int,
    eps: float,
    planes: Sequence[int],
) -> Tensor:
    """x: (B, N, C) -> (B, N, C), in the dtype of the weights. See `pvdm_fast.ops.attention_block`."""
    x = rows_dense(x)
    batch, tokens, channels = x.shape
    if tokens <= MOST_TOKENS and len(planes) == 2:
        qkv = _normed_product(x, norm_weight, norm_bias, qkv_weight, qkv_bias, groups, eps)
    else:
        normed, _, _ = plane_norm.forward(x, norm_weight, norm_bias, None, planes, groups, eps, False, 0)
        qkv = F.linear(normed, qkv_weight, qkv_bias)
    qkv = qkv.view(batch, tokens, heads, 3, channels // heads).transpose(2, 3)
    attended, _ = segment_attention.forward(qkv, PlaneLayout.from_sizes(planes).offsets, (channels // heads) ** -0.5)
    out = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    config = PROJECTION(x.device, "any", x.dtype)
    launch(
        attention_block_forward_projection,
        (triton.cdiv(batch * tokens, config.blocks["ROWS"]), triton.cdiv(channels, config.blocks["OUTPUTS"])),
        *(attended, proj_weight.contiguous(), proj_bias.contiguous(), x, out, batch * tokens, tokens),
        *x.stride()[:2],
        config=config,
        C=channels,
        PRECISION=dot_precision(x),
    )
    return out


def _normed_product(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """x: (B, N, C), one plane of up to MOST_TOKENS -> (B, N, 3 C), the projection of its norm."""
    batch, tokens, channels = x.shape
    qkv = torch.empty(batch, tokens, 3 * channels, dtype=x.dtype, device=x.device)
    config = QKV(x.device, "any", x.dtype)
    launch(
        attention_block_forward_qkv,
        (triton.cdiv(3 * channels, config.blocks["OUTPUTS"]), batch),
        *(x, norm_weight.contiguous(), norm_bias.contiguous(), weight.contiguous(), bias.contiguous(), qkv),
        *(tokens, eps, *x.stride()[:2]),
        config=config,
        GROUPS=groups,
        TOKENS=max(16, triton.next_power_of_2(tokens)),
        WIDTH=triton.next_power_of_2(channels // groups),
        C=channels,
        PRECISION=dot_precision(x),
    )
    return qkv

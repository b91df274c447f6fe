"""`feed_forward_block` in Triton: one launch for all that follows attention in a layer, in tiles of rows.

A program takes a tile through the output product, the norm and the feed-forward, one tile after the other, by the steps
of `triplane_project`. What one step hands to the next goes through memory of the program's own, written and read again
so soon that it stays in the L2:

    stream  C float32: the residual stream
    wide    PART: a part of the hidden layer, whose product is added to the stream before the next part

Normed rows lie where the tile's result will. At full size in bf16 (16384 tokens of 384 channels) a row takes 2560 bytes
of it, and 128 programs of 128 rows 42 MB. With the whole hidden layer it would be 75. Weights (3.9 MB) are read from
the L2 once for each tile. All of this is reasoned, not measured.

Not on AMD's GPUs, for the reason in `triplane_project`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch, programs_for
from pvdm_fast.kernels.math import dot_precision, normal
from pvdm_fast.kernels.triplane_project_steps import add, norm, product, tile_rows

WIDEST = 32768  # a weight then has at most 2^30 values, whose offsets fit 32 bits
# ROWS: of a tile. OUTPUTS, CHANNELS: of a step of a product. PART: of the hidden layer at a time. PROGRAMS: the most
# there are, one for each multiprocessor.
FORWARD = ConfigTable(
    "feed_forward_block",
    {
        ("*", "*", "*"): Config({"ROWS": 128, "OUTPUTS": 128, "CHANNELS": 32, "PART": 512, "PROGRAMS": 170}, 8, 2),
        ("*", "*", "float32"): Config({"ROWS": 64, "OUTPUTS": 64, "CHANNELS": 32, "PART": 512, "PROGRAMS": 132}, 8, 1),
        ("interpreter", "*", "*"): Config({"ROWS": 64, "OUTPUTS": 128, "CHANNELS": 128, "PART": 128, "PROGRAMS": 3}),
        **{
            (family, "*", dtype): Config(
                {"ROWS": 128, "OUTPUTS": outputs, "CHANNELS": channels, "PART": 512, "PROGRAMS": programs}, 8, stages
            )
            for family, outputs, channels, programs, stages in (
                ("sm80", 64, 64, 108, 3),
                ("sm90", 128, 64, 132, 3),
                ("sm100", 128, 32, 148, 2),
            )
            for dtype in ("bfloat16", "float16")
        },
    },
    candidates=tuple(
        Config({"ROWS": rows, "OUTPUTS": outputs, "CHANNELS": 64, "PART": part, "PROGRAMS": programs}, 8, stages)
        for rows, programs in ((64, 264), (128, 132))
        for outputs in (64, 128)
        for part in (256, 512)
        for stages in (2, 3)
    ),
)


def refusal(*inputs: Any) -> str | None:
    """Why the kernel doesn't take these arguments, or None."""
    widest = max(*inputs[2].shape, inputs[8].shape[1])
    if widest > WIDEST:
        return f"it takes at most {WIDEST} channels, inner or hidden, not {widest}: use the separate operations."
    return None


@triton.jit
def _begin(
    x, attended, stream, limit, weight, bias, inner, c,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """stream = x + attended weight' + bias."""
    for first in tl.range(0, c, OUTPUTS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        output = first + tl.arange(0, OUTPUTS)
        sums = product(
            attended, rows, limit, weight, output, inner, inner, inner, c, PRECISION, ROWS, OUTPUTS, CHANNELS
        )  # fmt: skip
        sums += tl.load(bias + output, mask=output < c, other=0.0).to(tl.float32)[None, :]
        inside = (rows < limit)[:, None] & (output < c)[None, :]
        place = rows[:, None] * c + output[None, :]
        sums += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(stream + place, sums, mask=inside)
    tl.debug_barrier()


@triton.jit
def _widen(
    narrow, wide, limit, weight, bias, start, c, hidden,
    PART: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """wide = value GELU(gate), for PART of the hidden layer from `start`."""
    gates = weight + tl.cast(hidden, tl.int64) * c
    for first in tl.range(0, PART, OUTPUTS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        place = first + tl.arange(0, OUTPUTS)
        output = start + place
        gate = product(narrow, rows, limit, gates, output, c, c, c, hidden, PRECISION, ROWS, OUTPUTS, CHANNELS)
        gate += tl.load(bias + hidden + output, mask=output < hidden, other=0.0).to(tl.float32)[None, :]
        cdf, _ = normal(gate)
        gate *= cdf
        value = product(narrow, rows, limit, weight, output, c, c, c, hidden, PRECISION, ROWS, OUTPUTS, CHANNELS)
        value += tl.load(bias + output, mask=output < hidden, other=0.0).to(tl.float32)[None, :]
        inside = (rows < limit)[:, None] & (output < hidden)[None, :]
        tl.store(wide + rows[:, None] * PART + place[None, :], (value * gate).to(wide.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def _end(stream, out, step, limit, bias, c, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """out = stream + bias."""
    rows = tile_rows(step, ROWS, 1)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        value = tl.load(stream + rows[:, None] * c + channel, mask=inside, other=0.0)
        value += tl.load(bias + channel, mask=channel < c, other=0.0).to(tl.float32)
        tl.store(out + rows[:, None] * c + channel, value.to(out.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def feed_forward_block_forward(
    x, attended, out_weight, out_bias, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias,
    stream, wide, out, tokens, c, inner, hidden, eps, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, PART: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """x, out: (tokens, c). attended: (tokens, inner). stream, wide: (programs, ROWS, ...). Grid: at most PROGRAMS."""
    program = tl.program_id(0).to(tl.int64)
    stream += program * ROWS * c
    wide += program * ROWS * PART
    for number in tl.range(
        tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        start = tl.cast(number, tl.int64) * ROWS
        limit = tl.minimum(tokens - start, ROWS).to(tl.int32)  # rows behind it don't exist
        _begin(
            x + start * c, attended + start * inner, stream, limit, out_weight, out_bias, inner, c,
            PRECISION, ROWS, OUTPUTS, CHANNELS,
        )  # fmt: skip
        rows, own = tile_rows(number, ROWS, 1), out + start * c
        norm(
            stream, own, rows, rows, limit, norm_weight, norm_bias, None, None, eps, c, c, ROWS, CHANNELS
        )  # fmt: skip
        for part in tl.range(0, hidden, PART, num_stages=1, disable_licm=True):
            # Half as many outputs at a time: a value and a gate take the registers of two.
            _widen(
                own, wide, limit, up_weight, up_bias, part, c, hidden,
                PART, PRECISION, ROWS, OUTPUTS // 2, CHANNELS,
            )  # fmt: skip
            add(
                wide, stream, limit, limit, down_weight + part, None, tl.minimum(hidden - part, PART), PART, hidden, c,
                PRECISION, 1, 1, ROWS, OUTPUTS, CHANNELS,
            )  # fmt: skip
        _end(stream, own, number, limit, down_bias, c, ROWS, CHANNELS)


def forward(x: Tensor, attended: Tensor, *arguments: Any) -> Tensor:
    """x: (B, N, C), attended: (B, N, inner), then what the reference takes -> (B, N, C)."""
    *weights, eps = arguments
    (batch, tokens, c), inner, hidden = x.shape, attended.shape[-1], weights[6].shape[1]
    config = FORWARD(x.device, "any", x.dtype)
    rows, part = config.blocks["ROWS"], config.blocks["PART"]
    tiles = triton.cdiv(batch * tokens, rows)
    programs = programs_for(tiles, config)
    memory = [
        torch.empty(programs, rows, size, dtype=dtype, device=x.device)
        for size, dtype in ((c, torch.float32), (part, x.dtype))
    ]
    out = torch.empty(batch, tokens, c, dtype=x.dtype, device=x.device)
    launch(
        feed_forward_block_forward,
        (programs,),
        *(t.contiguous() for t in (x, attended, *weights)),
        *(*memory, out, batch * tokens, c, inner, hidden, eps),
        config=config,
        PRECISION=dot_precision(x),
    )
    return out

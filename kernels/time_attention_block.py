"""`time_attention_block` in Triton: one launch for the norm, time attention and residual of a layer, in tiles of rows.

A program takes a tile of whole sequences through all steps, one tile after the other. A sequence's tokens lie a frame
apart in the lattice. They are read there again for every few heads, and normed in registers. What one step hands to the
next goes through memory of the program's own, written and read again so soon that it stays in the L2:

    wide      3 times the channels of the heads at a time: rotated queries and keys, and values
    attended  inner: the results of all heads

At full size in bf16 (16384 tokens of 384 channels) a row takes 1408 bytes of it, and 128 programs of 128 rows 23 MB.
With all heads at a time, and the stream and its normed rows in memory too, it would be 92 MB. Weights (1.6 MB) are read
from the L2 once for each tile, and the tile three times for each head. All of this is reasoned, not measured.

Attention is that of `triplane_project`. So a value that isn't finite also makes the other sequences of its tile NaN.
Not on AMD's GPUs, for the reason there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch, programs_for
from pvdm_fast.kernels.math import dot_precision
from pvdm_fast.kernels.normed_product import WIDEST, normed_product, statistics
from pvdm_fast.kernels.rotation import rotate
from pvdm_fast.kernels.triplane_project_steps import attend, product, tile_rows, width_of_a_step

LONGEST = 64  # tokens of a sequence: a tile of 64 rows holds one
# ROWS: of a tile. OUTPUTS, CHANNELS: of a step of a product. As many heads at a time as OUTPUTS hold, so that a product
# for q, k or v is one step. PROGRAMS: the most there are, one for each multiprocessor.
FORWARD = ConfigTable(
    "time_attention_block",
    {
        ("*", "*", "*"): Config({"ROWS": 128, "OUTPUTS": 64, "CHANNELS": 32, "PROGRAMS": 170}, 8, 2),
        ("*", "*", "float32"): Config({"ROWS": 64, "OUTPUTS": 64, "CHANNELS": 32, "PROGRAMS": 132}, 8, 1),
        ("interpreter", "*", "*"): Config({"ROWS": 64, "OUTPUTS": 64, "CHANNELS": 128, "PROGRAMS": 3}),
        **{
            (family, "*", dtype): Config(
                {"ROWS": 128, "OUTPUTS": 64, "CHANNELS": channels, "PROGRAMS": programs}, 8, stages
            )
            for family, channels, programs, stages in (
                ("sm80", 64, 108, 3),
                ("sm90", 64, 132, 3),
                ("sm100", 32, 148, 2),
            )
            for dtype in ("bfloat16", "float16")
        },
    },
    candidates=tuple(
        Config({"ROWS": rows, "OUTPUTS": outputs, "CHANNELS": channels, "PROGRAMS": programs}, 8, stages)
        for rows, programs in ((64, 264), (128, 132))
        for outputs in (64, 128)
        for channels, stages in ((32, 3), (64, 2), (64, 3))
    ),
)


def refusal(*inputs: Any) -> str | None:
    """Why the kernel doesn't take these arguments, or None."""
    widest, time = max(inputs[4].shape), inputs[8]
    if widest > WIDEST:
        return f"it takes at most {WIDEST} channels or inner, not {widest}: use the separate operations."
    if time > LONGEST:
        return f"it takes sequences of at most {LONGEST} tokens, not {time}: use the separate operations."
    return None


@triton.jit
def _sources(tile, step, sites, LENGTH: tl.constexpr, ROWS: tl.constexpr):
    """Where the tile's rows are in the lattice (B, LENGTH, sites). `step`: see `tile_rows`."""
    rows = tile_rows(step, ROWS, 1)
    sequence = tile * (ROWS // LENGTH) + rows // LENGTH
    frame = (sequence // sites).to(tl.int64) * LENGTH + rows % LENGTH
    return frame * sites + sequence % sites


@triton.jit
def _heads(
    x, wide, tile, sites, limit, mean, rstd, norm_weight, norm_bias, weight, sin, cos, start, part, c, inner,
    head_width, wide_stride, LENGTH: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """wide = (q | k | v) of some heads, `part` channels from `start`: q and k rotated by the tables."""
    for first in tl.range(0, 3 * part, OUTPUTS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        place = first + tl.arange(0, OUTPUTS)
        which, channel = place // part, place % part
        output = which * inner + start + channel
        sums = normed_product(
            x, rows, _sources(tile, first, sites, LENGTH, ROWS), limit, mean, rstd, norm_weight, norm_bias, weight,
            output, place < 3 * part, c, PRECISION, ROWS, OUTPUTS, CHANNELS,
        )  # fmt: skip
        table = (rows % LENGTH)[:, None] * head_width + (channel % head_width)[None, :]
        turned = (rows < limit)[:, None] & (which < 2)[None, :]
        sine = tl.load(sin + table, mask=turned, other=0.0)
        cosine = tl.load(cos + table, mask=turned, other=1.0)
        sums = rotate(sums, sine, cosine)
        inside = (rows < limit)[:, None] & (place < 3 * part)[None, :]
        tl.store(wide + rows[:, None] * wide_stride + place[None, :], sums.to(wide.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def _end(
    x, attended, out, tile, sites, limit, weight, bias, c, inner, LENGTH: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = x + attended weight' + bias, in the lattice."""
    for first in tl.range(0, c, OUTPUTS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        output = first + tl.arange(0, OUTPUTS)
        sums = product(
            attended, rows, limit, weight, output, inner, inner, inner, c, PRECISION, ROWS, OUTPUTS, CHANNELS
        )  # fmt: skip
        sums += tl.load(bias + output, mask=output < c, other=0.0).to(tl.float32)[None, :]
        inside = (rows < limit)[:, None] & (output < c)[None, :]
        place = _sources(tile, first, sites, LENGTH, ROWS)[:, None] * c + output[None, :]
        sums += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def time_attention_block_forward(
    x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, sin, cos, wide, attended, out,
    sequences, sites, c, heads, head_width, together, eps, scale,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """x, out: (B, LENGTH, sites, c). wide, attended: (programs, ROWS, ...). Grid: at most PROGRAMS.

    together: heads at a time. WIDTH: channels of a head at a time in attention.
    """
    PACKED: tl.constexpr = ROWS // LENGTH
    inner, wide_stride = heads * head_width, 3 * together * head_width
    program = tl.program_id(0).to(tl.int64)
    attended += program * ROWS * inner
    wide += program * ROWS * wide_stride
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(sequences, PACKED), tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        limit = tl.minimum(sequences - tile * PACKED, PACKED) * LENGTH  # rows behind it don't exist
        source = _sources(tile, tile, sites, LENGTH, ROWS)
        mean, rstd = statistics(x, tile_rows(tile, ROWS, 1), source, limit, eps, c, ROWS, CHANNELS)
        for head in tl.range(0, heads, together, num_stages=1, disable_licm=True):
            some, start = tl.minimum(heads - head, together), head * head_width
            _heads(
                x, wide, tile, sites, limit, mean, rstd, norm_weight, norm_bias, qkv_weight, sin, cos, start,
                some * head_width, c, inner, head_width, wide_stride, LENGTH, PRECISION, ROWS, OUTPUTS, CHANNELS,
            )  # fmt: skip
            attend(
                wide, attended + start, limit, scale, some, head_width, inner, wide_stride,
                PRECISION, LENGTH, ROWS, ROWS, WIDTH,
            )  # fmt: skip
        _end(
            x, attended, out, tile, sites, limit, out_weight, out_bias, c, inner,
            LENGTH, PRECISION, ROWS, OUTPUTS, CHANNELS,
        )  # fmt: skip


def forward(x: Tensor, *arguments: Any) -> Tensor:
    """x: (B, T sites, C), then what the reference takes -> (B, T sites, C)."""
    *tensors, time, heads, eps = arguments
    (batch, tokens, c), inner = x.shape, tensors[3].shape[1]
    config = FORWARD(x.device, "any", x.dtype)
    rows, head = config.blocks["ROWS"], inner // heads
    together = min(heads, max(1, config.blocks["OUTPUTS"] // head))
    sites = tokens // time
    tiles = triton.cdiv(batch * sites, rows // time)
    programs = programs_for(tiles, config)
    wide, attended = (
        torch.empty(programs, rows, size, dtype=x.dtype, device=x.device) for size in (3 * together * head, inner)
    )
    out = torch.empty(batch, tokens, c, dtype=x.dtype, device=x.device)
    launch(
        time_attention_block_forward,
        (programs,),
        *(t.contiguous() for t in (x, *tensors)),
        *(wide, attended, out, batch * sites, sites, c, heads, head, together, eps, head**-0.5),
        config=config,
        **dict(LENGTH=time, WIDTH=width_of_a_step(head, x.dtype), PRECISION=dot_precision(x)),
    )
    return out

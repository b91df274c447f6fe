"""`space_attention_heads` in Triton: two launches for the norm and the heads of space attention.

1. `space_attention_heads_keys_values`: a program norms a tile of rows in registers, and multiplies it by the weight of
   keys, which it rotates, or of values. It also writes each row's mean and 1 / std.
2. `space_attention_heads_forward`: a flash kernel whose program makes its own queries. A block of a head's queries is
   needed by one program alone, so nothing is computed twice, and queries are never written.

At full size in bf16 (16384 tokens of 384 channels) both move 113 MB. With normed rows, queries, and keys before their
rotation in memory it would be 192 (computed). A program of the second reads 98 KB of rows for its queries, next to 262
KB of keys and values, from the L2. All of this is reasoned, not measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels import axial_attention_long as long
from pvdm_fast.kernels.attention_common import padded, width_class
from pvdm_fast.kernels.axial_attention_long import attend_to_keys
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import dot_precision
from pvdm_fast.kernels.normed_product import WIDEST, normed_product, statistics
from pvdm_fast.kernels.rotation import rotate
from pvdm_fast.kernels.triplane_project_steps import tile_rows

WIDEST_HEAD = 64  # of wider ones, a block of queries and its tables spill on every GPU
CHANNELS = 32  # of a step of the product for queries
# ROWS: of a tile. OUTPUTS, CHANNELS: of a step of the product. Blocks of the second launch are those of
# `axial_attention`, whose loop it has.
KEYS_VALUES = ConfigTable(
    "space_attention_heads_keys_values",
    {
        ("*", "*", "*"): Config({"ROWS": 128, "OUTPUTS": 64, "CHANNELS": 32}, 8, 2),
        ("*", "*", "float32"): Config({"ROWS": 64, "OUTPUTS": 64, "CHANNELS": 32}, 4, 1),
        ("interpreter", "*", "*"): Config({"ROWS": 64, "OUTPUTS": 64, "CHANNELS": 128}),
        **{
            (family, "*", dtype): Config({"ROWS": 128, "OUTPUTS": 64, "CHANNELS": 64}, 8, 3)
            for family in ("sm80", "sm90")
            for dtype in ("bfloat16", "float16")
        },
    },
    candidates=tuple(
        Config({"ROWS": rows, "OUTPUTS": outputs, "CHANNELS": channels}, 8, stages)
        for rows in (64, 128)
        for outputs in (64, 128)
        for channels, stages in ((32, 3), (64, 2), (64, 3))
    ),
)


def refusal(*inputs: Any) -> str | None:
    """Why the kernels don't take these arguments, or None."""
    (outputs, channels), heads = inputs[3].shape, inputs[7]
    widest = max(outputs // 3, channels)
    if widest > WIDEST:
        return f"it takes at most {WIDEST} channels or inner, not {widest}: use the separate operations."
    if outputs // (3 * heads) > WIDEST_HEAD:
        return f"it takes heads of at most {WIDEST_HEAD} channels, not {outputs // (3 * heads)}: use more heads."
    return None


@triton.jit
def space_attention_heads_keys_values(
    x, norm_weight, norm_bias, weight, sin, cos, keys_values, means, rstds, tokens, sites, c, inner, head_width, eps,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x: (tokens, c) -> keys_values: (2, tokens, inner); means, rstds: (tokens). Grid: tiles x (keys, values)."""
    part = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * ROWS
    limit = tl.minimum(tokens - start, ROWS).to(tl.int32)  # rows behind it don't exist
    first_site = (start % sites).to(tl.int32)
    x += start * c
    own = tl.arange(0, ROWS)
    mean, rstd = statistics(x, own, own, limit, eps, c, ROWS, CHANNELS)
    if part == 0:
        tl.store(means + start + own, mean, mask=own < limit)
        tl.store(rstds + start + own, rstd, mask=own < limit)
    weight += (part + 1).to(tl.int64) * inner * c
    keys_values += (part * tl.cast(tokens, tl.int64) + start) * inner
    for first in tl.range(0, inner, OUTPUTS, num_stages=1, disable_licm=True):
        rows = tile_rows(first, ROWS, 1)
        output = first + tl.arange(0, OUTPUTS)
        sums = normed_product(
            x, rows, rows, limit, mean, rstd, norm_weight, norm_bias, weight, output, output < inner, c,
            PRECISION, ROWS, OUTPUTS, CHANNELS,
        )  # fmt: skip
        inside = (rows < limit)[:, None] & (output < inner)[None, :]
        table = ((first_site + rows) % sites)[:, None] * head_width + (output % head_width)[None, :]
        turned = inside & (part == 0)
        sine = tl.load(sin + table, mask=turned, other=0.0)
        cosine = tl.load(cos + table, mask=turned, other=1.0)
        sums = rotate(sums, sine, cosine)
        place = keys_values + rows[:, None] * inner + output[None, :]
        tl.store(place, sums.to(keys_values.dtype.element_ty), mask=inside)


@triton.jit
def space_attention_heads_forward(
    x, norm_weight, norm_bias, weight, sin, cos, keys_values, means, rstds, out, tokens, sites, c, heads, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x: (tokens, c), and what the first launch has written -> out: (tokens, heads, HEAD).

    Grid: query blocks x (frame, head). Blocks of one head are neighbours, so that they share its keys in the L2.
    """
    blocks = tl.cdiv(sites, BLOCK_M)
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    frame, head = (pair // heads).to(tl.int64) * sites, pair % heads
    inner = heads * HEAD
    start, limit = frame + block * BLOCK_M, sites - block * BLOCK_M
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    mean = tl.load(means + start + rows, mask=rows < limit, other=0.0)
    rstd = tl.load(rstds + start + rows, mask=rows < limit, other=0.0)
    q_tile = normed_product(
        x + start * c, rows, rows, limit, mean, rstd, norm_weight, norm_bias, weight, head * HEAD + columns,
        columns < HEAD, c, PRECISION, BLOCK_M, WIDTH, CHANNELS,
    )  # fmt: skip
    inside = (rows < limit)[:, None] & (columns < HEAD)[None, :]
    table = (block * BLOCK_M + rows)[:, None] * HEAD + columns[None, :]
    sin_tile = tl.load(sin + table, mask=inside, other=0.0)
    cos_tile = tl.load(cos + table, mask=inside, other=0.0)
    q_tile = rotate(q_tile, sin_tile, cos_tile).to(keys_values.dtype.element_ty)
    keys = keys_values + frame * inner + head * HEAD
    sums, _, total = attend_to_keys(
        q_tile, keys, keys + tl.cast(tokens, tl.int64) * inner, inner, inner, sites, scale,
        HEAD, WIDTH, PRECISION, EVEN, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    place = out + start * inner + rows[:, None] * inner + head * HEAD + columns[None, :]
    tl.store(place, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)


def forward(x: Tensor, *arguments: Any) -> Tensor:
    """x: (B, N, C), then what the reference takes -> (B, N, inner)."""
    *tensors, sites, heads, eps = arguments
    (batch, tokens, c), inner = x.shape, len(tensors[2]) // 3
    rows, head = batch * tokens, inner // heads
    keys_values = torch.empty(2, rows, inner, dtype=x.dtype, device=x.device)
    means, rstds = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    out = torch.empty(batch, tokens, inner, dtype=x.dtype, device=x.device)
    read = [t.contiguous() for t in (x, *tensors)]
    config = KEYS_VALUES(x.device, "any", x.dtype)
    launch(
        space_attention_heads_keys_values,
        (triton.cdiv(rows, config.blocks["ROWS"]), 2),
        *(*read, keys_values, means, rstds, rows, sites, c, inner, head, eps),
        config=config,
        PRECISION=dot_precision(x),
    )
    config = long.FORWARD(x.device, width_class(head), x.dtype)
    launch(
        space_attention_heads_forward,
        (triton.cdiv(sites, config.blocks["BLOCK_M"]) * (rows // sites) * heads,),
        *(*read, keys_values, means, rstds, out, rows, sites, c, heads, head**-0.5),
        config=config,
        **dict(HEAD=head, WIDTH=padded(head), PRECISION=dot_precision(x), CHANNELS=CHANNELS),
        EVEN=sites % config.blocks["BLOCK_N"] == 0,
    )
    return out

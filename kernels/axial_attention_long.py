"""Attention of long sequences, forward: flash kernels. A program takes a block of queries of one head.

Queries are rotated where they are loaded, once. Keys can't be: every block of queries goes through all keys, and the
float32 tables take 8 bytes per key element, which itself has 2 bytes in 16 bits. For 128 queries and 64 keys of d 64,
that is 32 KiB of tables per about 1000 cycles of products and exponentials. With k and v, each multiprocessor would
read 48 bytes per cycle, more than an H100's L2 delivers. So a first kernel writes rotated keys (backward: and queries)
to a buffer. At memory speed it takes about an eighth of forward's time at 1024 tokens, and less of backward's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.attention_common import (
    LOG2_E,
    log_sum_exp,
    no_softmax,
    padded,
    sequence_offset,
    softmax_step,
    strides_of,
    where_present,
    width_class,
)
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import dot_precision
from pvdm_fast.kernels.rotation import rotate


def blocks(queries: int, keys: int, warps: int, stages: int) -> Config:
    """A configuration of blocks of queries and keys."""
    return Config({"BLOCK_M": queries, "BLOCK_N": keys}, warps, stages)


@triton.jit
def axial_attention_rotate(
    x, sin, cos, rotated, x_strides, rotated_strides, x_part, rotated_part, sites, length, heads, parts,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x -> rotated: (B, sites, length, heads, HEAD) by strides. Both are `parts` such, `x_part`, `rotated_part` apart.

    Grid: row blocks x sequences. A program goes through all heads, so each row of the tables is read once.
    """
    blocks = tl.cdiv(length, BLOCK)
    sequence, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (rows < length)[:, None] & (columns < HEAD)
    table = rows[:, None] * HEAD + columns
    sin_tile = tl.load(sin + table, mask=inside, other=0.0)
    cos_tile = tl.load(cos + table, mask=inside, other=0.0)
    rows = rows.to(tl.int64)[:, None]
    for i in range(0, parts * heads):
        head, part = i % heads, (i // heads).to(tl.int64)
        source = x + part * x_part + sequence_offset(sequence, head, sites, x_strides)
        target = rotated + part * rotated_part + sequence_offset(sequence, head, sites, rotated_strides)
        tile = tl.load(source + rows * x_strides[2] + columns, mask=inside, other=0.0)
        tile = rotate(tile, sin_tile, cos_tile).to(rotated.dtype.element_ty)
        tl.store(target + rows * rotated_strides[2] + columns, tile, mask=inside)


@triton.jit
def attend_to_keys(
    q_tile, k, v, k_stride, v_stride, length, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Queries (BLOCK_M, WIDTH) over all keys and values of a head: its first rows, (length, HEAD) by strides.

    Returns the weighted sums of values, and what they are to be divided by: total weight, with the highest score.
    """
    columns = tl.arange(0, WIDTH)[None, :]
    keys = tl.arange(0, BLOCK_N)
    row = keys.to(tl.int64)[:, None]
    k_pointers = k + row * k_stride + columns
    v_pointers = v + row * v_stride + columns
    k_step = BLOCK_N * tl.cast(k_stride, tl.int64)
    v_step = BLOCK_N * tl.cast(v_stride, tl.int64)
    highest, total = no_softmax(BLOCK_M)
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(0, length, BLOCK_N):
        present = (start + keys < length)[:, None] & (columns < HEAD)
        k_tile = tl.load(k_pointers, mask=present, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)
        scores = where_present(scores, (start + keys < length)[None, :], float("-inf"), EVEN)
        weights, decay, highest, total = softmax_step(scores, 1.0, highest, total, 1)
        v_tile = tl.load(v_pointers, mask=present, other=0.0)
        sums = tl.dot(weights.to(v_tile.dtype), v_tile, sums * decay[:, None], input_precision=PRECISION)
        k_pointers += k_step
        v_pointers += v_step
    return sums, highest, total


@triton.jit
def axial_attention_long_forward(
    q, k, v, sin, cos, out, lse, q_strides, k_strides, v_strides, out_strides, sites, length, heads, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q (not rotated), k (rotated), v, out: (B, sites, length, heads, HEAD) by strides. lse: contiguous.

    Grid: query blocks x (sequence, head). Blocks of one head are neighbours, so that they share its keys in the L2.
    EVEN: length is a multiple of BLOCK_N.
    """
    blocks = tl.cdiv(length, BLOCK_M)
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    sequence, head = pair // heads, pair % heads
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (rows < length)[:, None] & (columns < HEAD)
    offsets = sequence_offset(sequence, head, sites, q_strides) + rows.to(tl.int64)[:, None] * q_strides[2] + columns
    q_tile = tl.load(q + offsets, mask=inside, other=0.0)
    if sin is not None:
        table = rows[:, None] * HEAD + columns
        sin_tile = tl.load(sin + table, mask=inside, other=0.0)
        cos_tile = tl.load(cos + table, mask=inside, other=0.0)
        q_tile = rotate(q_tile, sin_tile, cos_tile).to(k.dtype.element_ty)
    sums, highest, total = attend_to_keys(
        q_tile, k + sequence_offset(sequence, head, sites, k_strides),
        v + sequence_offset(sequence, head, sites, v_strides), k_strides[2], v_strides[2], length, scale,
        HEAD, WIDTH, PRECISION, EVEN, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    offsets = (
        sequence_offset(sequence, head, sites, out_strides) + rows.to(tl.int64)[:, None] * out_strides[2] + columns
    )
    tl.store(out + offsets, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + pair.to(tl.int64) * length + rows, log_sum_exp(highest, total), mask=rows < length)


# A thread holds 16 columns of one or two rows, and as many of both tables.
ROTATE = ConfigTable(
    "axial_attention_rotate",
    {("*", "*", "*"): Config({"BLOCK": 8}, 4, 1)}
    | {("*", f"d{width}", "*"): Config({"BLOCK": 2048 // width}, 4, 1) for width in (32, 64, 128, 256)},
)
# Large blocks of queries, because each goes through all keys and values. Eight warps hold the accumulators of 128
# queries where four would spill (sm_100, sm_120). On gfx942, eight warps of 64 leave a thread half the registers.
# Float32 products (without TF32) hold operands in registers too, so blocks are smaller. In the interpreter, blocks are
# small enough that tests have several.
FORWARD = ConfigTable(
    "axial_attention_long_forward",
    {
        ("*", "*", "*"): blocks(64, 64, 4, 2),
        ("*", "d32", "*"): blocks(128, 64, 8, 3),
        ("*", "d64", "*"): blocks(128, 64, 8, 3),
        ("*", "d128", "*"): blocks(128, 64, 8, 2),
        ("*", "d256", "*"): blocks(64, 32, 8, 2),
        ("*", "d32", "float32"): blocks(64, 32, 8, 2),
        ("*", "d64", "float32"): blocks(64, 32, 8, 2),
        ("*", "d128", "float32"): blocks(64, 32, 8, 2),
        ("*", "d256", "float32"): blocks(16, 32, 8, 1),
        ("gfx942", "*", "*"): blocks(64, 64, 4, 2),
        ("gfx942", "*", "float32"): blocks(64, 32, 8, 2),
        ("gfx942", "d32", "*"): blocks(128, 64, 4, 2),
        ("gfx942", "d64", "*"): blocks(128, 64, 4, 2),
        ("gfx942", "d256", "*"): blocks(64, 32, 8, 2),
        ("gfx942", "d32", "float32"): blocks(64, 32, 8, 2),
        ("gfx942", "d64", "float32"): blocks(64, 32, 8, 2),
        ("gfx942", "d256", "float32"): blocks(16, 32, 4, 1),
        ("interpreter", "*", "*"): blocks(64, 64, 4, 2),
    },
    tuple(
        blocks(m, n, warps, stages) for m in (64, 128) for n in (32, 64, 128) for warps in (4, 8) for stages in (2, 3)
    ),
)


def rotated(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """x: (B, sites, L, parts, heads, d) -> rotated, in the same shape. In memory each head's rows are neighbours."""
    batch, sites, length, parts, heads, width = x.shape
    result = torch.empty((parts, batch, sites, heads, length, width), dtype=x.dtype, device=x.device)
    result = result.permute(1, 2, 4, 0, 3, 5)
    config = ROTATE(x.device, width_class(width), x.dtype)
    launch(
        axial_attention_rotate,
        (triton.cdiv(length, config.blocks["BLOCK"]) * batch * sites,),
        *(x, sin, cos, result, strides_of(x.select(3, 0)), strides_of(result.select(3, 0))),
        *(x.stride(3), result.stride(3), sites, length, heads, parts),
        config=config,
        **dict(HEAD=width, WIDTH=padded(width)),
    )
    return result


def forward(qkv: Tensor, sin: Tensor | None, cos: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> None:
    """qkv: (B, sites, L, 3, heads, d). Writes out (B, sites, L, heads, d) and lse (B, sites, heads, L)."""
    batch, sites, length, _, heads, width = qkv.shape
    config = FORWARD(qkv.device, width_class(width), qkv.dtype)
    q, k, v = qkv.unbind(3)
    if sin is not None and cos is not None:
        k = rotated(qkv[:, :, :, 1:2], sin, cos).select(3, 0)
    launch(
        axial_attention_long_forward,
        (triton.cdiv(length, config.blocks["BLOCK_M"]) * batch * sites * heads,),
        *(q, k, v, sin, cos, out, lse, strides_of(q), strides_of(k), strides_of(v), strides_of(out)),
        *(sites, length, heads, scale),
        config=config,
        HEAD=width,
        WIDTH=padded(width),
        PRECISION=dot_precision(qkv),
        EVEN=length % config.blocks["BLOCK_N"] == 0,
    )

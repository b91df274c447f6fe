"""Attention of short sequences (at most 64 tokens), forward and backward: a program takes several whole sequences.

Sequences of one head are packed, row after row, into a square tile. Scores between different sequences are computed
too, and dropped. That wastes products, but no memory traffic, and traffic is the limit. In forward, 64 rows of d 64 in
16 bits are 32 KiB (q, k, v read once, out written) for 1 MFLOP: the tensor cores are busy an eighth of the time at 790
TFLOP/s and 3 TB/s. Backward reads q, k, v, grad once and writes dq, dk, dv: 56 KiB for 2.6 MFLOP. Every target's tensor
cores take one square product without padding each sequence. Of 64 rows, lengths 9, 16, 17 and 33 use 63, 64, 51 and 33.
A batch of products padded to powers of two would use 36, 64, 34 and 33.

A product meets all sequences of its tile. So a value that isn't finite also makes the other sequences' sums NaN,
because 0 times infinity is NaN. Scores are masked first, so in forward only v can do this. Float32 without TF32 has no
tensor cores, so there tiles are as small as the sequence allows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.attention_common import (
    LOG2_E,
    log_sum_exp,
    padded,
    sequence_offset,
    strides_of,
    width_class,
)
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import dot_precision, sum_of_products
from pvdm_fast.kernels.rotation import rotate, rotate_back

LONGEST = 64


@triton.jit
def packed_rows(tile, head, sites, sequences, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """For each row of the tile: its sequence's number in the tile, its place there, the sequence, and whether it
    exists."""
    PACKED: tl.constexpr = BLOCK // LENGTH
    rows = tl.arange(0, BLOCK)
    group, position = rows // LENGTH, rows % LENGTH
    sequence = tile * PACKED + group
    return group, position, sequence, (group < PACKED) & (sequence < sequences)


@triton.jit
def axial_attention_short_forward(
    q, k, v, sin, cos, out, lse, qkv_strides, out_strides, sites, sequences, heads, scale,
    LENGTH: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q, k, v, out: (B, sites, LENGTH, heads, HEAD) by strides. lse: (B, sites, heads, LENGTH), contiguous.

    Grid: tiles x heads. Heads are neighbours, so that together they read whole rows of qkv.
    """
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    group, position, sequence, exists = packed_rows(tile, head, sites, sequences, LENGTH, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    inside = exists[:, None] & (columns < HEAD)
    first = sequence_offset(sequence, head, sites, qkv_strides)
    offsets = (first + position.to(tl.int64) * qkv_strides[2])[:, None] + columns
    q_tile = tl.load(q + offsets, mask=inside, other=0.0)
    k_tile = tl.load(k + offsets, mask=inside, other=0.0)
    v_tile = tl.load(v + offsets, mask=inside, other=0.0)
    if sin is not None:
        table = position[:, None] * HEAD + columns
        sin_tile = tl.load(sin + table, mask=inside, other=0.0)
        cos_tile = tl.load(cos + table, mask=inside, other=0.0)
        q_tile = rotate(q_tile, sin_tile, cos_tile).to(v_tile.dtype)
        k_tile = rotate(k_tile, sin_tile, cos_tile).to(v_tile.dtype)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)
    # Rows that don't exist form a sequence of zeros, so that every row has a finite maximum.
    scores = tl.where(group[:, None] == group[None, :], scores, float("-inf"))
    highest = tl.max(scores, 1)
    weights = tl.exp2(scores - highest[:, None])
    total = tl.sum(weights, 1)
    sums = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION) / total[:, None]
    first = sequence_offset(sequence, head, sites, out_strides)
    offsets = (first + position.to(tl.int64) * out_strides[2])[:, None] + columns
    tl.store(out + offsets, sums.to(out.dtype.element_ty), mask=inside)
    lse_rows = (sequence.to(tl.int64) * heads + head) * LENGTH + position
    tl.store(lse + lse_rows, log_sum_exp(highest, total), mask=exists)


@triton.jit
def axial_attention_short_backward(
    grad, q, k, v, sin, cos, lse, dq, dk, dv, grad_strides, qkv_strides, dqkv_strides, sites, sequences, heads, scale,
    LENGTH: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same tiles. They hold all scores of a row, so delta is summed from the weights and their gradients. out isn't
    read."""
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    group, position, sequence, exists = packed_rows(tile, head, sites, sequences, LENGTH, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    inside = exists[:, None] & (columns < HEAD)
    first = sequence_offset(sequence, head, sites, qkv_strides)
    offsets = (first + position.to(tl.int64) * qkv_strides[2])[:, None] + columns
    q_tile = tl.load(q + offsets, mask=inside, other=0.0)
    k_tile = tl.load(k + offsets, mask=inside, other=0.0)
    v_tile = tl.load(v + offsets, mask=inside, other=0.0)
    first = sequence_offset(sequence, head, sites, grad_strides)
    offsets = (first + position.to(tl.int64) * grad_strides[2])[:, None] + columns
    grad_tile = tl.load(grad + offsets, mask=inside, other=0.0)
    lse_rows = (sequence.to(tl.int64) * heads + head) * LENGTH + position
    lse_tile = tl.load(lse + lse_rows, mask=exists, other=0.0) * LOG2_E
    table = position[:, None] * HEAD + columns
    if sin is not None:
        sin_tile = tl.load(sin + table, mask=inside, other=0.0)
        cos_tile = tl.load(cos + table, mask=inside, other=0.0)
        q_tile = rotate(q_tile, sin_tile, cos_tile).to(v_tile.dtype)
        k_tile = rotate(k_tile, sin_tile, cos_tile).to(v_tile.dtype)
    first = sequence_offset(sequence, head, sites, dqkv_strides)
    offsets = (first + position.to(tl.int64) * dqkv_strides[2])[:, None] + columns

    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)
    own = group[:, None] == group[None, :]
    weights = tl.where(own, tl.exp2(scores - lse_tile[:, None]), 0.0)
    dv_tile = tl.dot(tl.trans(weights.to(v_tile.dtype)), grad_tile, input_precision=PRECISION)
    tl.store(dv + offsets, dv_tile.to(dv.dtype.element_ty), mask=inside)
    dweights = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
    dweights = tl.where(own, dweights, 0.0)
    delta = sum_of_products(weights, dweights, 1)
    dscores = tl.where(own, weights * (dweights - delta[:, None]), 0.0).to(v_tile.dtype)
    dq_tile = tl.dot(dscores, k_tile, input_precision=PRECISION) * scale
    dk_tile = tl.dot(tl.trans(dscores), q_tile, input_precision=PRECISION) * scale
    if sin is not None:
        # Read again from the L1. Holding it would take registers through the products.
        sin_tile = tl.load(sin + table, mask=inside, other=0.0)
        cos_tile = tl.load(cos + table, mask=inside, other=0.0)
        dq_tile = rotate_back(dq_tile, sin_tile, cos_tile)
        dk_tile = rotate_back(dk_tile, sin_tile, cos_tile)
    tl.store(dq + offsets, dq_tile.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + offsets, dk_tile.to(dk.dtype.element_ty), mask=inside)


def serves(length: int, width: int, dtype: torch.dtype) -> bool:
    """Whether backward fits a tile of a whole sequence in a program's registers.

    In 16 bits that is up to 64 tokens of 128 columns. In float32 it is a quarter: products without TF32 hold operands
    in registers.
    """
    rows = max(16, triton.next_power_of_2(length))
    return rows <= LONGEST and rows * padded(width) <= (2048 if dtype == torch.float32 else 8192)


def shape_class(length: int, width: int) -> str:
    """ "16-d64": lengths up to 16, 32 or 64, then `width_class`."""
    return f"{max(16, triton.next_power_of_2(length))}-{width_class(width)}"


# 64 rows: four warps with a tensor core's 16 rows each, and 24 KiB of loads in flight per program of d 64. Eight warps
# where four would spill in backward. Float32: the fewest rows, because each further row adds a product for every row.
ENTRIES = {
    ("*", "*", "*"): Config({"BLOCK": 64}, 4, 1),
    **{("*", f"{length}-d128", "*"): Config({"BLOCK": 64}, 8, 1) for length in (16, 32, 64)},
    **{("*", f"{length}-d256", "*"): Config({"BLOCK": 32}, 8, 1) for length in (16, 32)},
    ("*", "16-d32", "float32"): Config({"BLOCK": 32}, 4, 1),
    ("*", "32-d32", "float32"): Config({"BLOCK": 32}, 4, 1),
    ("*", "64-d32", "float32"): Config({"BLOCK": 64}, 8, 1),
    ("*", "16-d64", "float32"): Config({"BLOCK": 16}, 4, 1),
    ("*", "32-d64", "float32"): Config({"BLOCK": 32}, 8, 1),
    ("*", "16-d128", "float32"): Config({"BLOCK": 16}, 8, 1),
}
CANDIDATES = tuple(Config({"BLOCK": rows}, warps, 1) for rows in (64, 128) for warps in (4, 8))
FORWARD = ConfigTable("axial_attention_short_forward", ENTRIES, CANDIDATES)
BACKWARD = ConfigTable("axial_attention_short_backward", ENTRIES, CANDIDATES)


def forward(qkv: Tensor, sin: Tensor | None, cos: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> None:
    """qkv: (B, sites, L, 3, heads, d). Writes out (B, sites, L, heads, d) and lse (B, sites, heads, L)."""
    batch, sites, length, _, heads, width = qkv.shape
    config = FORWARD(qkv.device, shape_class(length, width), qkv.dtype)
    q, k, v = qkv.unbind(3)
    launch(
        axial_attention_short_forward,
        (triton.cdiv(batch * sites, config.blocks["BLOCK"] // length) * heads,),
        *(q, k, v, sin, cos, out, lse, strides_of(q), strides_of(out), sites, batch * sites, heads, scale),
        config=config,
        **dict(LENGTH=length, HEAD=width, WIDTH=padded(width), PRECISION=dot_precision(qkv)),
    )


def backward(
    grad: Tensor, qkv: Tensor, sin: Tensor | None, cos: Tensor | None, lse: Tensor, dqkv: Tensor, scale: float
) -> None:
    """grad: (B, sites, L, heads, d). Writes dqkv (B, sites, L, 3, heads, d)."""
    batch, sites, length, _, heads, width = qkv.shape
    config = BACKWARD(qkv.device, shape_class(length, width), qkv.dtype)
    (q, k, v), (dq, dk, dv) = qkv.unbind(3), dqkv.unbind(3)
    launch(
        axial_attention_short_backward,
        (triton.cdiv(batch * sites, config.blocks["BLOCK"] // length) * heads,),
        *(grad, q, k, v, sin, cos, lse, dq, dk, dv, strides_of(grad), strides_of(q), strides_of(dq)),
        *(sites, batch * sites, heads, scale),
        config=config,
        **dict(LENGTH=length, HEAD=width, WIDTH=padded(width), PRECISION=dot_precision(qkv)),
    )

"""Attention with one query per sequence, forward and backward: elementwise, and each key and value is read once.

Each key element is used for one product and one sum, so there is no reuse and no work for tensor cores. Keys and values
are all the traffic (backward: read once, and their gradients written once). A program takes a few (sequence, head)
pairs, which are neighbours in memory. It walks along the keys a few at a time, with a running softmax. So any length
works, with little padding: lengths 9, 17 and 33 use 75, 85 and 92 % of their steps of 4.

Keys are the first axis of a tile. Threads are dealt out from the last axis, so they cover columns and pairs, and each
holds all keys of its pair and columns. The softmax and the sum of values then stay in registers. Only scores are summed
over threads, by shuffles, and no warp waits for another. (With keys as the middle axis there would be 16 barriers.)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.attention_common import (
    LOG2_E,
    delta_of,
    log_sum_exp,
    no_softmax,
    padded,
    sequence_offset,
    softmax_step,
    strides_of,
    width_class,
)
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import sum_of_products


@triton.jit
def axial_attention_query_forward(
    q, k, v, out, lse, q_strides, qkv_strides, out_strides, sites, pairs, heads, length, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """q, out: (B, sites, 1, heads, HEAD), k, v: (B, sites, length, heads, HEAD), all by strides. lse: contiguous."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < pairs
    sequence, head = pair // heads, pair % heads
    columns = tl.arange(0, WIDTH)
    inside = exists[:, None] & (columns < HEAD)[None, :]
    query = tl.load(
        q + sequence_offset(sequence, head, sites, q_strides)[:, None] + columns[None, :], mask=inside, other=0.0
    )
    query = query.to(tl.float32) * (scale * LOG2_E)
    first = sequence_offset(sequence, head, sites, qkv_strides)[None, :, None] + columns[None, None, :]
    highest, total = no_softmax(PAIRS)
    sums = tl.zeros((PAIRS, WIDTH), tl.float32)
    for start in range(0, length, KEYS):
        key = start + tl.arange(0, KEYS)
        offsets = first + key.to(tl.int64)[:, None, None] * qkv_strides[2]
        mask = inside[None, :, :] & (key < length)[:, None, None]
        k_tile = tl.load(k + offsets, mask=mask, other=0.0).to(tl.float32)
        v_tile = tl.load(v + offsets, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where((key < length)[:, None], sum_of_products(query[None, :, :], k_tile, 2), float("-inf"))
        weights, decay, highest, total = softmax_step(scores, 1.0, highest, total, 0)
        sums = sums * decay[:, None] + tl.sum(weights[:, :, None] * v_tile, 0)
    offsets = sequence_offset(sequence, head, sites, out_strides)[:, None] + columns[None, :]
    tl.store(out + offsets, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + pair.to(tl.int64), log_sum_exp(highest, total), mask=exists)


@triton.jit
def axial_attention_query_backward(
    grad, q, k, v, out, lse, dq, dk, dv, grad_strides, q_strides, qkv_strides, out_strides, dq_strides, dqkv_strides,
    sites, pairs, heads, length, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The same walk. It writes the gradients of keys and values on the way, and the query's at the end."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < pairs
    sequence, head = pair // heads, pair % heads
    columns = tl.arange(0, WIDTH)
    inside = exists[:, None] & (columns < HEAD)[None, :]
    offsets = sequence_offset(sequence, head, sites, q_strides)[:, None] + columns[None, :]
    query = tl.load(q + offsets, mask=inside, other=0.0).to(tl.float32) * scale
    offsets = sequence_offset(sequence, head, sites, grad_strides)[:, None] + columns[None, :]
    incoming = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
    offsets = sequence_offset(sequence, head, sites, out_strides)[:, None] + columns[None, :]
    delta = delta_of(incoming, tl.load(out + offsets, mask=inside, other=0.0))
    normalizer = tl.load(lse + pair.to(tl.int64), mask=exists, other=0.0)
    first = sequence_offset(sequence, head, sites, qkv_strides)[None, :, None] + columns[None, None, :]
    dfirst = sequence_offset(sequence, head, sites, dqkv_strides)[None, :, None] + columns[None, None, :]
    dquery = tl.zeros((PAIRS, WIDTH), tl.float32)
    for start in range(0, length, KEYS):
        key = start + tl.arange(0, KEYS)
        row = key.to(tl.int64)[:, None, None]
        mask = inside[None, :, :] & (key < length)[:, None, None]
        k_tile = tl.load(k + first + row * qkv_strides[2], mask=mask, other=0.0).to(tl.float32)
        v_tile = tl.load(v + first + row * qkv_strides[2], mask=mask, other=0.0).to(tl.float32)
        scores = (sum_of_products(query[None, :, :], k_tile, 2) - normalizer[None, :]) * LOG2_E
        weights = tl.where((key < length)[:, None], tl.exp2(scores), 0.0)
        dscores = weights * (sum_of_products(incoming[None, :, :], v_tile, 2) - delta[None, :])
        dv_tile = weights[:, :, None] * incoming[None, :, :]
        dk_tile = dscores[:, :, None] * query[None, :, :]
        dquery += tl.sum(dscores[:, :, None] * k_tile, 0)
        tl.store(dv + dfirst + row * dqkv_strides[2], dv_tile.to(dv.dtype.element_ty), mask=mask)
        tl.store(dk + dfirst + row * dqkv_strides[2], dk_tile.to(dk.dtype.element_ty), mask=mask)
    offsets = sequence_offset(sequence, head, sites, dq_strides)[:, None] + columns[None, :]
    tl.store(dq + offsets, (dquery * scale).to(dq.dtype.element_ty), mask=inside)


# As many pairs as give each of 128 threads 16 bytes of every row. Four keys at a time are eight such loads in flight.
# (Heads of 8 channels are loaded value by value, each with its own address. They take half the pairs, or they spill.)
ENTRIES = {
    ("*", f"d{width}", dtype): Config({"PAIRS": 2048 // (width * size), "KEYS": 4}, 4, 1)
    for width in (32, 64, 128, 256)
    for dtype, size in (("*", 2), ("float32", 4))
} | {("*", "d8", "*"): Config({"PAIRS": 16, "KEYS": 4}, 4, 1)}
CANDIDATES = tuple(
    Config({"PAIRS": pairs, "KEYS": keys}, warps, 1)
    for warps, pairs in ((2, 8), (4, 16), (8, 32))
    for keys in (2, 4, 8)
)
FORWARD = ConfigTable(
    "axial_attention_query_forward", {("*", "*", "*"): Config({"PAIRS": 8, "KEYS": 4}, 4, 1)} | ENTRIES, CANDIDATES
)
BACKWARD = ConfigTable(
    "axial_attention_query_backward",
    {("*", "*", "*"): Config({"PAIRS": 8, "KEYS": 4}, 4, 1)}
    | ENTRIES
    | {("*", "d32", "*"): Config({"PAIRS": 32, "KEYS": 2}, 4, 1)},  # with four keys, 16-bit heads of 32 spill
    CANDIDATES,
)


def shape_class(width: int) -> str:
    """ "d8" for heads of at most 8 channels, else `width_class`."""
    return "d8" if width <= 8 else width_class(width)


def forward(query: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
    """query: (B, sites, 1, heads, d), qkv: (B, sites, L, 2, heads, d). Writes out (like query), one lse per query."""
    batch, sites, length, _, heads, width = qkv.shape
    config = FORWARD(qkv.device, shape_class(width), qkv.dtype)
    k, v = qkv.unbind(3)
    pairs = batch * sites * heads
    launch(
        axial_attention_query_forward,
        (triton.cdiv(pairs, config.blocks["PAIRS"]),),
        *(
            query,
            k,
            v,
            out,
            lse,
            strides_of(query),
            strides_of(k),
            strides_of(out),
            sites,
            pairs,
            heads,
            length,
            scale,
        ),
        config=config,
        **dict(HEAD=width, WIDTH=padded(width)),
    )


def backward(
    grad: Tensor, query: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, dquery: Tensor, dqkv: Tensor, scale: float
) -> None:
    """grad, out: like query. Writes dquery, like query, and dqkv, like qkv."""
    batch, sites, length, _, heads, width = qkv.shape
    config = BACKWARD(qkv.device, shape_class(width), qkv.dtype)
    (k, v), (dk, dv) = qkv.unbind(3), dqkv.unbind(3)
    pairs = batch * sites * heads
    launch(
        axial_attention_query_backward,
        (triton.cdiv(pairs, config.blocks["PAIRS"]),),
        *(grad, query, k, v, out, lse, dquery, dk, dv),
        *(strides_of(x) for x in (grad, query, k, out, dquery, dk)),
        *(sites, pairs, heads, length, scale),
        config=config,
        **dict(HEAD=width, WIDTH=padded(width)),
    )

"""Attention inside segments, backward: one kernel for the gradient of queries, one for that of keys and values.

Both recompute the weights from the log-sum-exp that forward saved. Each gradient is summed by the one program that
stores it, in the order of tokens, so every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pvdm_fast.kernels.attention_common import (
    LOG2_E,
    delta_of,
    load_rows,
    scores_by_chunks,
    store_rows,
    where_present,
)
from pvdm_fast.kernels.segment_attention_forward import BOUNDS, locate, table


@triton.jit(do_not_specialize=["blocks", "tokens", *BOUNDS])
def segment_attention_backward_dq(
    grad, qkv, out, lse, delta, dqkv, scale, scale_log2, blocks, tokens, start, end0, end1, end2, heads,
    grad_strides, strides, d_strides,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The queries' part of dqkv. Also delta (B, heads, N) = rowsum(dO . O), which the other kernel reads.

    Grid: blocks of queries x heads x B. out and lse are contiguous, the others by strides.
    """
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = problem // heads, problem % heads
    segment_start, segment_end, first = locate(tl.program_id(0) % blocks, start, end0, end1, end2, BLOCK_M)
    q_base = qkv + batch * strides[0] + head * strides[3]
    k_base, v_base = q_base + strides[2], q_base + 2 * strides[2]
    grad_base = grad + batch * grad_strides[0] + head * grad_strides[2]
    out_base = out + (batch * tokens * heads + head) * HEAD
    g = load_rows(grad_base, first, segment_end, grad_strides[1], HEAD, BLOCK_M, WIDTH, HEAD == WIDTH, EVEN)
    o = load_rows(out_base, first, segment_end, heads * HEAD, HEAD, BLOCK_M, WIDTH, HEAD == WIDTH, EVEN)
    if CHUNK >= WIDTH:
        q = load_rows(q_base, first, segment_end, strides[1], HEAD, BLOCK_M, WIDTH, HEAD == WIDTH, EVEN)
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < segment_end
    d = delta_of(g, o)
    tl.store(delta + problem * tokens + rows, d, mask=inside)
    log = tl.load(lse + problem * tokens + rows, mask=inside, other=float("inf")) * LOG2_E
    dq = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for key in range(segment_start, segment_end, BLOCK_N):
        k = load_rows(k_base, key, segment_end, strides[1], HEAD, BLOCK_N, WIDTH, HEAD == WIDTH, EVEN)
        if CHUNK >= WIDTH:
            v = load_rows(v_base, key, segment_end, strides[1], HEAD, BLOCK_N, WIDTH, HEAD == WIDTH, EVEN)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dweights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        else:
            scores = scores_by_chunks(
                q_base, first, strides[1], k_base, key, strides[1], segment_end,
                HEAD, BLOCK_M, BLOCK_N, WIDTH, CHUNK, EVEN, PRECISION,
            )  # fmt: skip
            dweights = scores_by_chunks(
                grad_base, first, grad_strides[1], v_base, key, strides[1], segment_end,
                HEAD, BLOCK_M, BLOCK_N, WIDTH, CHUNK, EVEN, PRECISION,
            )  # fmt: skip
        # A missing key scores 0. Against scores far below 0, its weight would overflow.
        present = (key + tl.arange(0, BLOCK_N) < segment_end)[None, :]
        scores = where_present(scores * scale_log2 - log[:, None], present, float("-inf"), EVEN)
        dscores = tl.exp2(scores) * (dweights - d[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_base = dqkv + batch * d_strides[0] + head * d_strides[3]
    store_rows(dq_base, first, segment_end, d_strides[1], dq * scale, HEAD, BLOCK_M, WIDTH)


@triton.jit(do_not_specialize=["blocks", "tokens", *BOUNDS])
def segment_attention_backward_dkdv(
    grad, qkv, lse, delta, dqkv, scale, scale_log2, blocks, tokens, start, end0, end1, end2, heads,
    grad_strides, strides, d_strides,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The keys' and values' parts of dqkv: dV = P'dO, dK = dS'Q. Grid: blocks of keys x heads x B."""
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = problem // heads, problem % heads
    segment_start, segment_end, first = locate(tl.program_id(0) % blocks, start, end0, end1, end2, BLOCK_N)
    q_base = qkv + batch * strides[0] + head * strides[3]
    grad_base = grad + batch * grad_strides[0] + head * grad_strides[2]
    k_base, v_base = q_base + strides[2], q_base + 2 * strides[2]
    if CHUNK >= WIDTH:
        k = load_rows(k_base, first, segment_end, strides[1], HEAD, BLOCK_N, WIDTH, HEAD == WIDTH, EVEN)
        v = load_rows(v_base, first, segment_end, strides[1], HEAD, BLOCK_N, WIDTH, HEAD == WIDTH, EVEN)
    dk = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for query in range(segment_start, segment_end, BLOCK_M):
        q = load_rows(q_base, query, segment_end, strides[1], HEAD, BLOCK_M, WIDTH, HEAD == WIDTH, EVEN)
        g = load_rows(grad_base, query, segment_end, grad_strides[1], HEAD, BLOCK_M, WIDTH, HEAD == WIDTH, EVEN)
        rows = query + tl.arange(0, BLOCK_M)
        inside = rows < segment_end
        # Missing keys fill rows that nobody stores.
        log = tl.load(lse + problem * tokens + rows, mask=inside, other=float("inf")) * LOG2_E
        d = tl.load(delta + problem * tokens + rows, mask=inside, other=0.0)
        if CHUNK >= WIDTH:
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dweights = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        else:
            scores = scores_by_chunks(
                k_base, first, strides[1], q_base, query, strides[1], segment_end,
                HEAD, BLOCK_N, BLOCK_M, WIDTH, CHUNK, EVEN, PRECISION,
            )  # fmt: skip
            dweights = scores_by_chunks(
                v_base, first, strides[1], grad_base, query, grad_strides[1], segment_end,
                HEAD, BLOCK_N, BLOCK_M, WIDTH, CHUNK, EVEN, PRECISION,
            )  # fmt: skip
        # A missing query has an infinite log, so no weights, except where a key is infinite.
        weights = where_present(tl.exp2(scores * scale_log2 - log[None, :]), inside[None, :], 0.0, EVEN)
        dv = tl.dot(weights.to(g.dtype), g, dv, input_precision=PRECISION)
        dscores = weights * (dweights - d[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_base = dqkv + batch * d_strides[0] + head * d_strides[3] + d_strides[2]
    store_rows(dk_base, first, segment_end, d_strides[1], dk * scale, HEAD, BLOCK_N, WIDTH)
    store_rows(dk_base + d_strides[2], first, segment_end, d_strides[1], dv, HEAD, BLOCK_N, WIDTH)


# Reasoned, not measured, as in forward. A program of the second kernel holds two sums of BLOCK_N rows.
DQ = table(
    "segment_attention_dq",
    {
        ("*", "d32"): (128, 64, 8, 2),
        ("*", "d64"): (128, 64, 8, 2),
        ("*", "d128"): (64, 64, 8, 2),
        ("*", "d256"): (64, 32, 8, 1),
        ("sm90", "d128"): (128, 64, 8, 2),
        ("sm90", "d256"): (32, 32, 8, 1),
        ("sm100", "d128"): (128, 32, 8, 2),
        ("gfx942", "d128"): (64, 32, 4, 2),
        ("gfx942", "d256"): (32, 32, 4, 1),
        ("*", "d32-few"): (32, 64, 4, 2),
        ("*", "d64-few"): (32, 64, 4, 2),
        ("*", "d128-few"): (16, 64, 4, 2),
        ("*", "d256-few"): (16, 32, 4, 1),
        ("interpreter", "*"): (64, 32, 1, 1),
    },
    {
        ("*", "d32"): (32, 32, 4, 2),
        ("*", "d64"): (32, 32, 8, 1),
        ("*", "d128"): (32, 32, 8, 1),
        ("*", "d256"): (32, 16, 8, 2),
        ("sm90", "d64"): (32, 16, 8, 2),
        ("gfx942", "d128"): (32, 32, 4, 2),
        ("*", "d32-few"): (16, 32, 4, 2),
        ("*", "d64-few"): (16, 32, 4, 1),
        ("*", "d128-few"): (16, 32, 8, 2),
        ("*", "d256-few"): (16, 16, 8, 2),
        ("sm80", "d256-few"): (16, 16, 8, 1),
        ("interpreter", "*"): (32, 64, 1, 1),
    },
)
DKDV = table(
    "segment_attention_dkdv",
    {
        ("*", "d32"): (64, 128, 8, 2),
        ("*", "d64"): (64, 128, 8, 2),
        ("*", "d128"): (64, 64, 8, 2),
        ("*", "d256"): (32, 32, 8, 1),
        ("sm90", "d128"): (32, 128, 8, 2),
        ("sm100", "d32"): (32, 128, 8, 2),
        ("sm100", "d128"): (32, 128, 8, 2),
        ("gfx942", "d32"): (64, 64, 4, 2),
        ("gfx942", "d64"): (64, 64, 4, 2),
        ("gfx942", "d128"): (32, 64, 4, 2),
        ("gfx942", "d256"): (16, 32, 4, 1),
        ("*", "d32-few"): (32, 32, 4, 2),
        ("*", "d64-few"): (32, 32, 4, 2),
        ("*", "d128-few"): (32, 16, 4, 2),
        ("*", "d256-few"): (16, 16, 8, 2),  # one stage spills on sm80
        ("interpreter", "*"): (64, 32, 1, 1),
    },
    {
        ("*", "d32"): (32, 32, 4, 1),
        ("*", "d64"): (32, 32, 8, 1),
        ("*", "d128"): (32, 32, 8, 2),
        ("*", "d256"): (16, 16, 8, 2),
        ("sm100", "d128"): (32, 16, 8, 2),
        ("sm120", "d128"): (32, 16, 8, 2),
        ("gfx942", "d64"): (32, 32, 8, 2),
        ("gfx942", "d128"): (16, 32, 8, 2),
        ("*", "d32-few"): (32, 16, 4, 2),
        ("*", "d64-few"): (32, 16, 4, 2),
        ("*", "d128-few"): (32, 16, 8, 2),
        ("*", "d256-few"): (16, 16, 8, 2),
        ("interpreter", "*"): (32, 64, 1, 1),
    },
)

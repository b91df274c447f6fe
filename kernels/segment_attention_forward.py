"""Attention inside segments, forward: a flash kernel. A program takes one block of queries of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from pvdm_fast.kernels.attention_common import (
    load_rows,
    log_sum_exp,
    no_softmax,
    scores_by_chunks,
    softmax_step,
    store_rows,
    where_present,
)
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config

Sizes = tuple[int, ...]  # BLOCK_M, BLOCK_N, warps, stages


def table(name: str, sixteen: dict[tuple[str, str], Sizes], float32: dict[tuple[str, str], Sizes]) -> ConfigTable:
    """The configurations of one kernel by (architecture, shape class), for 16-bit values and for float32.

    NVIDIA GPUs don't compute float32 products on tensor cores (unless TF32 is allowed). Operands then come into
    registers whole, so blocks are small, and scores of heads over 32 are summed by chunks.
    """
    entries = {("*", "*", "*"): Config({"BLOCK_M": 16, "BLOCK_N": 16, "CHUNK": 32}, 4, 1)}
    for (where, shape), (m, n, warps, stages) in sixteen.items():
        for dtype in ("bfloat16", "float16"):
            entries[where, shape, dtype] = Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)
    for (where, shape), (m, n, warps, stages) in float32.items():
        entries[where, shape, "float32"] = Config({"BLOCK_M": m, "BLOCK_N": n, "CHUNK": 32}, warps, stages)
    candidates = tuple(
        Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)
        for m in (32, 64, 128)
        for n in (32, 64, 128)
        for warps in (4, 8)
        for stages in (1, 2, 3)
    )
    return ConfigTable(name, entries, candidates)


# How many segments one launch takes: three, the planes of a triplane. Their bounds are integers of the launch, not a
# table in memory. So nothing is sent to the device, and no program waits for a load to find its place.
# They aren't one tuple, because Triton 3.6 to 3.9 compile tuple elements of 1, or divisible by 16, into the kernel even
# with do_not_specialize.
SEGMENTS = 3
BOUNDS = ["start", "end0", "end1", "end2"]  # change with every layout, so they are never compiled into a kernel


@triton.jit
def locate(block, start, end0, end1, end2, BLOCK: tl.constexpr):
    """Finds the `block`-th block of BLOCK tokens: (start, end) of its segment, and its first token.

    Segments are start..end0..end1..end2, and the last ones may be empty. No block crosses a segment's end.
    """
    blocks0 = tl.cdiv(end0 - start, BLOCK)
    blocks1 = blocks0 + tl.cdiv(end1 - end0, BLOCK)
    in_first, in_third = block < blocks0, block >= blocks1
    segment_start = tl.where(in_first, start, tl.where(in_third, end1, end0))
    segment_end = tl.where(in_first, end0, tl.where(in_third, end2, end1))
    before = tl.where(in_first, 0, tl.where(in_third, blocks1, blocks0))
    return segment_start, segment_end, segment_start + (block - before) * BLOCK


@triton.jit(do_not_specialize=["blocks", "tokens", *BOUNDS])
def segment_attention_forward(
    qkv, out, lse, scale_log2, sign, blocks, tokens, start, end0, end1, end2,
    heads, strides, HEAD: tl.constexpr, WIDTH: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """qkv (B, N, 3, heads, HEAD) by `strides` -> out (B, N, heads, HEAD) and lse (B, heads, N), contiguous.

    Grid: blocks of queries x heads x B. Blocks of one head are neighbours, so that they share its keys and values in
    the L2.

    scale_log2 is positive, and sign is that of the scale. So the scale can be applied after a row's maximum, and costs
    no multiplication of its own.
    """
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = problem // heads, problem % heads
    segment_start, segment_end, first = locate(tl.program_id(0) % blocks, start, end0, end1, end2, BLOCK_M)
    q_base = qkv + batch * strides[0] + head * strides[3]
    k_base, v_base = q_base + strides[2], q_base + 2 * strides[2]
    if CHUNK >= WIDTH:
        q = load_rows(q_base, first, segment_end, strides[1], HEAD, BLOCK_M, WIDTH, HEAD == WIDTH, EVEN)
        q = (q.to(tl.float32) * sign).to(q.dtype)
    highest, total = no_softmax(BLOCK_M)
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for key in range(segment_start, segment_end, BLOCK_N):
        if CHUNK >= WIDTH:
            k = load_rows(k_base, key, segment_end, strides[1], HEAD, BLOCK_N, WIDTH, HEAD == WIDTH, EVEN)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            scores = sign * scores_by_chunks(
                q_base, first, strides[1], k_base, key, strides[1], segment_end,
                HEAD, BLOCK_M, BLOCK_N, WIDTH, CHUNK, EVEN, PRECISION,
            )  # fmt: skip
        present = (key + tl.arange(0, BLOCK_N) < segment_end)[None, :]
        scores = where_present(scores, present, float("-inf"), EVEN)
        weights, decay, highest, total = softmax_step(scores, scale_log2, highest, total, 1)
        v = load_rows(v_base, key, segment_end, strides[1], HEAD, BLOCK_N, WIDTH, HEAD == WIDTH, EVEN)
        sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None], input_precision=PRECISION)
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(lse + problem * tokens + rows, log_sum_exp(highest, total), mask=rows < segment_end)
    out_base = out + (batch * tokens * heads + head) * HEAD
    store_rows(out_base, first, segment_end, heads * HEAD, sums / total[:, None], HEAD, BLOCK_M, WIDTH)


# Reasoned, not measured. 128 queries give any tensor core full tiles, and each key that is read serves 128 of them. 8
# warps wherever 4 can't hold the sums in registers (compiled for every architecture here without spills). If shared
# memory allows (sm90, sm100), 128 keys at a time halve the number of rescalings. "-few": a program for every
# multiprocessor matters more than reading keys from the L2 again.
FORWARD = table(
    "segment_attention_forward",
    {
        ("*", "d32"): (128, 64, 4, 2),
        ("*", "d64"): (128, 64, 8, 2),
        ("*", "d128"): (128, 64, 8, 2),
        ("*", "d256"): (64, 32, 8, 2),
        ("sm80", "d32"): (128, 64, 4, 3),
        ("sm80", "d64"): (128, 64, 8, 3),
        ("sm90", "d32"): (128, 128, 8, 3),
        ("sm90", "d64"): (128, 128, 8, 3),
        ("sm90", "d128"): (128, 128, 8, 2),
        ("sm100", "d32"): (128, 128, 8, 3),
        ("sm100", "d64"): (128, 128, 8, 3),
        ("*", "d32-few"): (32, 64, 4, 2),
        ("*", "d64-few"): (32, 64, 4, 2),
        ("*", "d128-few"): (16, 64, 4, 2),
        ("*", "d256-few"): (16, 32, 4, 2),
        ("interpreter", "*"): (64, 32, 1, 1),
    },
    {
        ("*", "d32"): (64, 32, 4, 2),
        ("*", "d64"): (64, 32, 4, 2),
        ("*", "d128"): (32, 32, 4, 2),
        ("*", "d256"): (32, 32, 8, 2),
        ("*", "d32-few"): (32, 32, 4, 2),
        ("*", "d64-few"): (32, 32, 8, 2),
        ("*", "d128-few"): (16, 32, 8, 2),
        ("*", "d256-few"): (16, 32, 8, 2),
        ("interpreter", "*"): (32, 64, 1, 1),
    },
)

"""Attention of long sequences, backward: one kernel for queries, one for keys and values. Programs sum their own rows.

Both kernels recompute the weights from the saved log-sum-exp. That takes seven products instead of five, but no atomics
and no float32 gradient buffers. The first kernel also writes delta, which the second needs of each query. Both rotate
their gradients back where they are stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.attention_common import (
    LOG2_E,
    delta_of,
    padded,
    sequence_offset,
    strides_of,
    where_present,
    width_class,
)
from pvdm_fast.kernels.axial_attention_long import blocks, rotated
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import launch
from pvdm_fast.kernels.math import dot_precision
from pvdm_fast.kernels.rotation import rotate_back


@triton.jit
def axial_attention_long_backward_dq(
    grad, q, k, v, sin, cos, out, lse, delta, dq,
    grad_strides, q_strides, k_strides, v_strides, out_strides, dq_strides, sites, length, heads, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and delta (B, sites, heads, length). q and k are rotated. Grid and EVEN as in forward."""
    blocks = tl.cdiv(length, BLOCK_M)
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    sequence, head = pair // heads, pair % heads
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = rows.to(tl.int64)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (rows < length)[:, None] & (columns < HEAD)
    offsets = sequence_offset(sequence, head, sites, q_strides) + row * q_strides[2] + columns
    q_tile = tl.load(q + offsets, mask=inside, other=0.0)
    offsets = sequence_offset(sequence, head, sites, grad_strides) + row * grad_strides[2] + columns
    grad_tile = tl.load(grad + offsets, mask=inside, other=0.0)
    offsets = sequence_offset(sequence, head, sites, out_strides) + row * out_strides[2] + columns
    out_tile = tl.load(out + offsets, mask=inside, other=0.0)
    statistics = pair.to(tl.int64) * length + rows
    lse_tile = tl.load(lse + statistics, mask=rows < length, other=0.0) * LOG2_E
    delta_tile = delta_of(grad_tile, out_tile)
    tl.store(delta + statistics, delta_tile, mask=rows < length)

    keys = tl.arange(0, BLOCK_N)
    row = keys.to(tl.int64)[:, None]
    k_pointers = k + sequence_offset(sequence, head, sites, k_strides) + row * k_strides[2] + columns
    v_pointers = v + sequence_offset(sequence, head, sites, v_strides) + row * v_strides[2] + columns
    k_step = BLOCK_N * k_strides[2].to(tl.int64)
    v_step = BLOCK_N * v_strides[2].to(tl.int64)
    dq_tile = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(0, length, BLOCK_N):
        present = (start + keys < length)[:, None] & (columns < HEAD)
        k_tile = tl.load(k_pointers, mask=present, other=0.0)
        v_tile = tl.load(v_pointers, mask=present, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)
        present = (start + keys < length)[None, :]
        weights = where_present(tl.exp2(scores - lse_tile[:, None]), present, 0.0, EVEN)
        dweights = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        dscores = weights * (dweights - delta_tile[:, None])
        dq_tile = tl.dot(dscores.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION)
        k_pointers += k_step
        v_pointers += v_step
    dq_tile *= scale
    if sin is not None:
        table = rows[:, None] * HEAD + columns
        sin_tile = tl.load(sin + table, mask=inside, other=0.0)
        cos_tile = tl.load(cos + table, mask=inside, other=0.0)
        dq_tile = rotate_back(dq_tile, sin_tile, cos_tile)
    row = rows.to(tl.int64)[:, None]
    offsets = sequence_offset(sequence, head, sites, dq_strides) + row * dq_strides[2] + columns
    tl.store(dq + offsets, dq_tile.to(dq.dtype.element_ty), mask=inside)


@triton.jit
def axial_attention_long_backward_dkdv(
    grad, q, k, v, sin, cos, lse, delta, dk, dv, grad_strides, q_strides, k_strides, v_strides, dk_strides,
    sites, length, heads, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv (with the same strides). A program takes BLOCK_N keys through all queries, with transposed scores.

    EVEN: length is a multiple of BLOCK_M. Otherwise queries past the end get weights of 0. (Finite keys would need no
    mask.)
    """
    blocks = tl.cdiv(length, BLOCK_N)
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    sequence, head = pair // heads, pair % heads
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = keys.to(tl.int64)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (keys < length)[:, None] & (columns < HEAD)
    offsets = sequence_offset(sequence, head, sites, k_strides) + row * k_strides[2] + columns
    k_tile = tl.load(k + offsets, mask=inside, other=0.0)
    offsets = sequence_offset(sequence, head, sites, v_strides) + row * v_strides[2] + columns
    v_tile = tl.load(v + offsets, mask=inside, other=0.0)

    rows = tl.arange(0, BLOCK_M)
    row = rows.to(tl.int64)[:, None]
    q_pointers = q + sequence_offset(sequence, head, sites, q_strides) + row * q_strides[2] + columns
    grad_pointers = grad + sequence_offset(sequence, head, sites, grad_strides) + row * grad_strides[2] + columns
    q_step = BLOCK_M * q_strides[2].to(tl.int64)
    grad_step = BLOCK_M * grad_strides[2].to(tl.int64)
    statistics = pair.to(tl.int64) * length
    dk_tile = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for start in range(0, length, BLOCK_M):
        exists = start + rows < length
        present = exists[:, None] & (columns < HEAD)
        q_tile = tl.load(q_pointers, mask=present, other=0.0)
        grad_tile = tl.load(grad_pointers, mask=present, other=0.0)
        lse_tile = tl.load(lse + statistics + start + rows, mask=exists, other=0.0) * LOG2_E
        delta_tile = tl.load(delta + statistics + start + rows, mask=exists, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2_E)
        weights = where_present(tl.exp2(scores - lse_tile[None, :]), exists[None, :], 0.0, EVEN)
        dv_tile = tl.dot(weights.to(grad_tile.dtype), grad_tile, dv_tile, input_precision=PRECISION)
        dweights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
        dscores = weights * (dweights - delta_tile[None, :])
        dk_tile = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
        q_pointers += q_step
        grad_pointers += grad_step
    row = keys.to(tl.int64)[:, None]
    offsets = sequence_offset(sequence, head, sites, dk_strides) + row * dk_strides[2] + columns
    tl.store(dv + offsets, dv_tile.to(dv.dtype.element_ty), mask=inside)
    dk_tile *= scale
    if sin is not None:
        table = keys[:, None] * HEAD + columns
        sin_tile = tl.load(sin + table, mask=inside, other=0.0)
        cos_tile = tl.load(cos + table, mask=inside, other=0.0)
        dk_tile = rotate_back(dk_tile, sin_tile, cos_tile)
    tl.store(dk + offsets, dk_tile.to(dk.dtype.element_ty), mask=inside)


# As in forward. The key kernel holds two accumulators and three tiles of operands, so its blocks are smaller still.
QUERY = ConfigTable(
    "axial_attention_long_query",
    {
        ("*", "*", "*"): blocks(64, 64, 4, 2),
        ("*", "d128", "*"): blocks(64, 64, 8, 2),
        ("*", "d256", "*"): blocks(32, 32, 8, 1),
        ("*", "*", "float32"): blocks(32, 32, 8, 2),
        ("*", "d128", "float32"): blocks(32, 32, 8, 2),
        ("*", "d256", "float32"): blocks(16, 16, 8, 2),  # one stage spills
        ("gfx942", "*", "*"): blocks(64, 64, 4, 2),
        ("gfx942", "*", "float32"): blocks(32, 32, 4, 1),
        ("gfx942", "d128", "*"): blocks(64, 32, 4, 2),
        ("gfx942", "d128", "float32"): blocks(32, 32, 4, 1),
        ("gfx942", "d256", "*"): blocks(32, 32, 4, 1),
        ("gfx942", "d256", "float32"): blocks(16, 16, 4, 1),
    },
    tuple(blocks(m, n, warps, stages) for m in (64, 128) for n in (32, 64) for warps in (4, 8) for stages in (1, 2)),
)
KEY = ConfigTable(
    "axial_attention_long_key",
    {
        ("*", "*", "*"): blocks(32, 64, 4, 2),
        ("*", "d128", "*"): blocks(32, 64, 8, 2),
        ("*", "d256", "*"): blocks(32, 32, 8, 1),
        ("*", "*", "float32"): blocks(32, 32, 8, 2),
        ("*", "d128", "float32"): blocks(16, 16, 8, 2),
        ("*", "d256", "float32"): blocks(16, 16, 8, 1),
        **{
            key: config
            for architecture in ("sm90", "sm100")
            for width in ("d32", "d64")
            for key, config in (
                ((architecture, width, "*"), blocks(64, 128, 8, 2)),
                ((architecture, width, "float32"), blocks(32, 32, 8, 2)),
            )
        },
        ("gfx942", "*", "float32"): blocks(32, 32, 4, 1),
        ("gfx942", "*", "*"): blocks(32, 64, 4, 2),
        ("gfx942", "d128", "*"): blocks(32, 64, 4, 2),
        ("gfx942", "d128", "float32"): blocks(16, 32, 4, 1),
        ("gfx942", "d256", "*"): blocks(32, 16, 4, 1),
        ("gfx942", "d256", "float32"): blocks(16, 16, 4, 1),
    },
    tuple(blocks(m, n, warps, stages) for m in (32, 64) for n in (64, 128) for warps in (4, 8) for stages in (1, 2)),
)


def backward(
    grad: Tensor,
    qkv: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dqkv: Tensor,
    scale: float,
) -> None:
    """grad, out: (B, sites, L, heads, d), qkv: (B, sites, L, 3, heads, d). Writes dqkv, like qkv."""
    batch, sites, length, _, heads, width = qkv.shape
    (q, k, v), (dq, dk, dv) = qkv.unbind(3), dqkv.unbind(3)
    if sin is not None and cos is not None:
        q, k = rotated(qkv[:, :, :, :2], sin, cos).unbind(3)
    delta = torch.empty_like(lse)
    constants = dict(HEAD=width, WIDTH=padded(width), PRECISION=dot_precision(qkv))
    config = QUERY(qkv.device, width_class(width), qkv.dtype)
    launch(
        axial_attention_long_backward_dq,
        (triton.cdiv(length, config.blocks["BLOCK_M"]) * batch * sites * heads,),
        *(grad, q, k, v, sin, cos, out, lse, delta, dq),
        *(strides_of(x) for x in (grad, q, k, v, out, dq)),
        *(sites, length, heads, scale),
        config=config,
        **constants,
        EVEN=length % config.blocks["BLOCK_N"] == 0,
    )
    config = KEY(qkv.device, width_class(width), qkv.dtype)
    launch(
        axial_attention_long_backward_dkdv,
        (triton.cdiv(length, config.blocks["BLOCK_N"]) * batch * sites * heads,),
        *(grad, q, k, v, sin, cos, lse, delta, dk, dv),
        *(strides_of(x) for x in (grad, q, k, v, dk)),
        *(sites, length, heads, scale),
        config=config,
        **constants,
        EVEN=length % config.blocks["BLOCK_M"] == 0,
    )

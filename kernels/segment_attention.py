"""`segment_attention` in Triton: launchers of the flash kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.attention_common import LOG2_E, padded, refuse_width, strides_of, width_class
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import dot_precision
from pvdm_fast.kernels.segment_attention_backward import (
    DKDV,
    DQ,
    segment_attention_backward_dkdv,
    segment_attention_backward_dq,
)
from pvdm_fast.kernels.segment_attention_forward import FORWARD, SEGMENTS, segment_attention_forward


def refusal(*inputs: Any) -> str | None:
    """Why the kernels don't take these arguments (of either direction, a tensor of heads first), or None."""
    return refuse_width(inputs[0].shape[-1])


def shape_class(qkv: Tensor) -> str:
    """ "d<head size>", the least of 32, 64, 128 and 256 that holds it. Then "-few" if there are few queries.

    Few means less than a large GPU's worth: 128 programs of 128 queries each. At batch 1 with 8 heads, that is N below
    2048.
    """
    batch, tokens, _, heads, _ = qkv.shape
    return width_class(qkv.shape[-1]) + ("-few" if batch * heads * tokens < 128 * 128 else "")


def constants(qkv: Tensor, offsets: Sequence[int], config: Config) -> dict[str, Any]:
    """The compile-time arguments of all three kernels. EVEN: all blocks are full, so nothing needs a mask."""
    blocks = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    width = padded(qkv.shape[-1])
    return {
        "HEAD": qkv.shape[-1],
        "WIDTH": width,
        "EVEN": all((end - start) % block == 0 for start, end in pairwise(offsets) for block in blocks),
        "PRECISION": dot_precision(qkv),
        "CHUNK": width,  # for the scores' sums: all columns at once, unless the configuration says otherwise
    }


def grids(offsets: Sequence[int], problems: int, block: int) -> Iterator[tuple[tuple[int], tuple[int, ...]]]:
    """(grid, (blocks per problem, *bounds)) of each launch. A launch takes SEGMENTS segments: a triplane is one."""
    for first in range(0, len(offsets) - 1, SEGMENTS):
        bounds = list(offsets[first : first + SEGMENTS + 1])
        blocks = sum(triton.cdiv(end - start, block) for start, end in pairwise(bounds))
        yield (blocks * problems,), (blocks, *bounds, *bounds[-1:] * (SEGMENTS + 1 - len(bounds)))


def forward(qkv: Tensor, offsets: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """qkv: (B, N, 3, heads, d) -> out: (B, N, heads, d), log-sum-exp of the scores: (B, heads, N) float32."""
    batch, tokens, _, heads, width = qkv.shape
    out = torch.empty(batch, tokens, heads, width, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv.device)
    qkv = rows_dense(qkv)
    config = FORWARD(qkv.device, shape_class(qkv), qkv.dtype)
    sign = float((scale > 0) - (scale < 0))
    for grid, (blocks, *bounds) in grids(offsets, batch * heads, config.blocks["BLOCK_M"]):
        launch(
            segment_attention_forward,
            grid,
            *(qkv, out, lse, abs(scale) * LOG2_E.value if sign else 1.0, sign, blocks, tokens, *bounds, heads),
            strides_of(qkv),
            config=config,
            **constants(qkv, offsets, config),
        )
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Sequence[int], scale: float) -> Tensor:
    """The gradient of `qkv`, with its shape and memory order."""
    batch, tokens, _, heads, _ = qkv.shape
    dqkv = torch.empty_like(qkv)
    written = dqkv if dqkv.stride(-1) == 1 else torch.empty_like(dqkv, memory_format=torch.contiguous_format)
    delta = torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv.device)
    grad, qkv, out, lse = rows_dense(grad), rows_dense(qkv), out.contiguous(), lse.contiguous()
    scales = (scale, scale * LOG2_E.value)
    strides = strides_of(grad), strides_of(qkv), strides_of(written)
    config = DQ(qkv.device, shape_class(qkv), qkv.dtype)
    for grid, (blocks, *bounds) in grids(offsets, batch * heads, config.blocks["BLOCK_M"]):
        launch(
            segment_attention_backward_dq,
            grid,
            *(grad, qkv, out, lse, delta, written, *scales, blocks, tokens, *bounds, heads, *strides),
            config=config,
            **constants(qkv, offsets, config),
        )
    config = DKDV(qkv.device, shape_class(qkv), qkv.dtype)
    for grid, (blocks, *bounds) in grids(offsets, batch * heads, config.blocks["BLOCK_N"]):
        launch(
            segment_attention_backward_dkdv,
            grid,
            *(grad, qkv, lse, delta, written, *scales, blocks, tokens, *bounds, heads, *strides),
            config=config,
            **constants(qkv, offsets, config),
        )
    return dqkv if written is dqkv else dqkv.copy_(written)

"""Shared by `segment_attention` and `axial_attention` on a GPU: strided sequences, which kernel fits, outputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.cuda import launch_refusal, launch_target
from pvdm_fast.backends.extensions import extension

PACK = 8  # channels: heads are padded to a multiple of this, so that rows are read 16 bytes at a time
MATRIX_WIDTH = 128  # the widest head that the tensor-core kernel takes
# Segments of this many tokens or more use tensor cores. 16 queries fill a warp's tile, but a block takes 64, and below
# that most of its products are masked. Reasoned, not measured.
MATRIX_LENGTH = 64
MOST_WIDTH, MOST_SEGMENTS = 256, 32  # limits of the kernels: channels of a head, segments in their arguments


def refusal(*inputs: Any) -> str | None:
    """Why the kernels don't take these arguments (of either direction: a tensor of heads first, offsets as a
    list), or None."""
    offsets = next((value for value in inputs if isinstance(value, (list, tuple))), ())
    if inputs[0].shape[-1] > MOST_WIDTH:
        return f"it takes heads of at most {MOST_WIDTH} channels, not {inputs[0].shape[-1]}: use another backend."
    if len(offsets) > MOST_SEGMENTS + 1:
        return f"it takes at most {MOST_SEGMENTS} segments, not {len(offsets) - 1}: use another backend."
    return launch_refusal(inputs[0].numel() // max(inputs[0].shape[-1], 1))


def aligned(x: Tensor) -> bool:
    """Whether rows are whole packs that start at multiples of 16 bytes."""
    unit = 16 // x.element_size()
    strides = all(stride % unit == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    return x.shape[-1] % PACK == 0 and x.stride(-1) == 1 and strides and x.data_ptr() % 16 == 0


def fit(x: Tensor) -> Tensor:
    """`x`, or a copy whose rows are aligned and zero-padded to whole packs."""
    return x if aligned(x) else F.pad(x, (0, -x.shape[-1] % PACK)).contiguous()


def room_for(x: Tensor) -> Tensor:
    """`x` itself if kernels can fill it, otherwise an aligned buffer to copy from."""
    return x if aligned(x) else x.new_empty(*x.shape[:-1], x.shape[-1] + -x.shape[-1] % PACK)


def use_tensor_cores(qkv: Tensor, query: Tensor | None, offsets: Sequence[int]) -> bool:
    longest = max(end - start for start, end in itertools.pairwise(offsets))
    half = qkv.dtype in (torch.bfloat16, torch.float16)
    return half and query is None and qkv.shape[-1] <= MATRIX_WIDTH and longest >= MATRIX_LENGTH


def forward(
    qkv: Tensor,
    query: Tensor | None,
    tables: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    offsets: Sequence[int],
    scale: float,
) -> Tensor:
    """qkv: (B, sites, L, 3 or 2, heads, d), query: (B, sites, 1, heads, d). Fills out (B, sites, queries, heads, d).

    Returns the log-sum-exp of the scores, (B, sites, heads, queries) float32.
    """
    batch, sites, queries, heads, width = out.shape
    lse = torch.empty(batch, sites, heads, queries, dtype=torch.float32, device=out.device)
    filled = room_for(out)
    extension("_cuda").attention_forward(
        *(fit(qkv), None if query is None else fit(query), *map(_table, tables)),
        *(filled, lse, list(offsets), scale, use_tensor_cores(qkv, query, offsets)),
        *launch_target(qkv),
    )
    if filled is not out:
        out.copy_(filled[..., :width])
    return lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    query: Tensor | None,
    tables: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    lse: Tensor,
    dqkv: Tensor,
    dquery: Tensor | None,
    offsets: Sequence[int],
    scale: float,
) -> None:
    """Fills dqkv and dquery, which are shaped like qkv and query."""
    lse = lse.contiguous()
    filled, filled_query = room_for(dqkv), None if dquery is None else room_for(dquery)
    extension("_cuda").attention_backward(
        *(fit(grad.to(qkv.dtype)), fit(qkv), None if query is None else fit(query), *map(_table, tables)),
        *(fit(out), lse, torch.empty_like(lse), filled, filled_query),
        *(list(offsets), scale, use_tensor_cores(qkv, query, offsets)),
        *launch_target(qkv),
    )
    for asked, got in ((dqkv, filled), (dquery, filled_query)):
        if asked is not None and got is not None and got is not asked:
            asked.copy_(got[..., : asked.shape[-1]])


def _table(table: Tensor | None) -> Tensor | None:
    """A rotation table as the kernels read it: float32, rows of whole packs."""
    return None if table is None else fit(table.float()).contiguous()

"""Attention inside segments of the token axis: one segment is cross-plane attention, a layout's offsets in-plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.ops.registry import autocast, expect, expect_real, register


def _fake(qkv: Tensor, offsets: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    return qkv.new_empty(batch, tokens, heads, width), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


def _backward_fake(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Sequence[int], scale: float) -> Tensor:
    return torch.empty_like(qkv)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.offsets, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    dqkv = torch.ops.pvdm_fast.segment_attention_backward(grad, *ctx.saved_tensors, ctx.offsets, ctx.scale, ctx.backend)
    return dqkv, None, None, None


register(
    "segment_attention",
    schema="(Tensor qkv, int[] offsets, float scale, str backend) -> (Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int[] offsets, float scale, str backend)"
    " -> Tensor",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def segment_attention(qkv: Tensor, offsets: Sequence[int] | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention inside each segment of the token axis, heads apart (PVDM, section 3.2).

    Args:
        qkv: (B, N, 3, heads, d), any strides: queries, keys and values of one buffer, so that their gradient is one
            buffer too. float32, bfloat16, float16 (float64 on `reference`). Differentiable.
        offsets: where segments start, and the end: (0, n1, ..., N). None: one segment, every token attends to all.
        scale: of the scores; None: d ** -0.5.

    Returns:
        (B, N, heads, d), contiguous.

    Large scores: float32 rounds a score s by 6e-8 |s|, which a softmax feels absolutely. Rows of -inf give NaN. The cpu
    kernels are as exact as the formula in float32 at any size. The cuda kernels compute probabilities of the backward
    pass from a log-sum-exp in float32, which makes them wrong by up to 2e-7 |s|.

    Raises:
        ValueError: shapes or offsets that don't fit.
    """
    expect_real("segment_attention", qkv)
    expect(
        qkv.dim() == 5 and qkv.shape[2] == 3 and qkv.numel() > 0,
        f"segment_attention: qkv must be (B, N, 3, heads, d) and not empty, but has shape {tuple(qkv.shape)}.",
    )
    tokens = qkv.shape[1]
    offsets = [0, tokens] if offsets is None else list(offsets)
    expect(
        len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == tokens and offsets == sorted(set(offsets)),
        f"segment_attention: offsets must rise from 0 to the number of tokens, {tokens}, but are {offsets}.",
    )
    (qkv,) = autocast(qkv)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.pvdm_fast.segment_attention(qkv, offsets, scale, choice.requested())[0]

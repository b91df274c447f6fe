"""Attention along time, or inside frames, of a lattice of tokens; the table rotation of q and k is part of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.ops.registry import autocast, expect, expect_real, register


def _fake(
    qkv: Tensor, query: Tensor | None, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float
) -> tuple[Tensor, Tensor]:
    batch, time, height, width, _, heads, head_width = qkv.shape
    if query is not None:
        time = 1
    sites, queries = (height * width, time) if axis == "time" else (time, height * width)
    out = qkv.new_empty(batch, time, height, width, heads, head_width)
    return out, qkv.new_empty(batch, sites, heads, queries, dtype=torch.float32)


def _backward_fake(grad: Tensor, qkv: Tensor, query: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    dquery = qkv.new_empty(0) if query is None else torch.empty_like(query, memory_format=torch.contiguous_format)
    return torch.empty_like(qkv), dquery


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, query, sin, cos, ctx.axis, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(qkv, query, sin, cos, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    dqkv, dquery = torch.ops.pvdm_fast.axial_attention_backward(
        grad, *ctx.saved_tensors, ctx.axis, ctx.scale, ctx.backend
    )
    return dqkv, dquery if ctx.needs_input_grad[1] else None, None, None, None, None, None


register(
    "axial_attention",
    schema="(Tensor qkv, Tensor? query, Tensor? sin, Tensor? cos, str axis, float scale, str backend)"
    " -> (Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor qkv, Tensor? query, Tensor? sin, Tensor? cos, Tensor out, Tensor lse,"
    " str axis, float scale, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def axial_attention(
    qkv: Tensor,
    axis: str,
    rotation: tuple[Tensor, Tensor] | None = None,
    query: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention along one axis of a lattice (the TimeSformer layers and the projections of PVDM).

    Args:
        qkv: (B, T, H, W, 3, heads, d), any strides. Differentiable. With `query`, keys and values only:
            (B, T, H, W, 2, heads, d).
        axis: "time": a sequence is the T tokens of one site; "space": the H W tokens of one frame.
        rotation: (sin, cos) tables, each (sequence length, d) float32: q and k become x cos + R(x) sin, where R takes
            each neighbouring pair (a, b) to (-b, a). Not differentiable.
        query: (B, 1, H, W, heads, d): one query a sequence along time instead of T. Differentiable.
        scale: of the scores; None: d ** -0.5.

    Returns:
        (B, T, H, W, heads, d), or (B, 1, H, W, heads, d) with `query`; contiguous.

    Raises:
        ValueError: shapes that don't fit, an unknown axis, or `query` with a rotation or along space.
    """
    expect_real("axial_attention", qkv, query, *(rotation or ()))
    parts = 3 if query is None else 2
    expect(
        qkv.dim() == 7 and qkv.shape[4] == parts and qkv.numel() > 0,
        f"axial_attention: qkv must be (B, T, H, W, {parts}, heads, d) and not empty, not {tuple(qkv.shape)}.",
    )
    expect(axis in ("time", "space"), f"axial_attention: axis must be 'time' or 'space', not {axis!r}.")
    batch, time, height, width, _, heads, head_width = qkv.shape
    if query is not None:
        expect(
            axis == "time" and rotation is None and query.shape == (batch, 1, height, width, heads, head_width),
            "axial_attention: query must be (B, 1, H, W, heads, d), along time and without rotation; "
            f"got shape {tuple(query.shape)}, axis {axis!r}.",
        )
    length = time if axis == "time" else height * width
    sin, cos = rotation if rotation is not None else (None, None)
    for table in (sin, cos):
        expect(
            table is None or table.shape == (length, head_width),
            f"axial_attention: rotation tables must be ({length}, {head_width}).",
        )
    (qkv,) = autocast(qkv)
    query = query if query is None else query.to(qkv.dtype)
    scale = head_width**-0.5 if scale is None else scale
    return torch.ops.pvdm_fast.axial_attention(qkv, query, sin, cos, axis, scale, choice.requested())[0]

"""The heads of a layer's space attention in the autoencoder, with their norm, as one operation, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.ops import costs
from pvdm_fast.ops.fusing import fuses
from pvdm_fast.ops.registry import expect_dtype, expect_real, expect_shapes, register_by_reference

OP = "space_attention_heads"
# A program takes up to 128 queries of one frame. From here on half of them at least are there. Reasoned, not measured.
LEAST_SITES = 64


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    sin: Tensor,
    cos: Tensor,
    sites: int,
    heads: int,
    eps: float,
) -> None:
    expect_real(OP, x, norm_weight, norm_bias, qkv_weight, sin, cos)
    if x.dim() != 3 or x.numel() == 0 or sites < 1 or x.shape[1] % sites:
        raise ValueError(f"{OP}: x must be (B, T H W, C) with H W = {sites}, and not empty, not {tuple(x.shape)}.")
    if qkv_weight.dim() != 2 or len(qkv_weight) == 0 or heads < 1 or len(qkv_weight) % (6 * heads):
        raise ValueError(
            f"{OP}: qkv_weight must be (3 inner, C), and inner an even multiple of {heads} heads, not "
            f"{tuple(qkv_weight.shape)}."
        )
    c, outputs = x.shape[2], len(qkv_weight)
    table = (sites, outputs // (3 * heads))
    norm = dict(norm_weight=(norm_weight, (c,)), norm_bias=(norm_bias, (c,)))
    expect_shapes(OP, **norm, qkv_weight=(qkv_weight, (outputs, c)), sin=(sin, table), cos=(cos, table))
    expect_dtype(OP, x.dtype, norm_weight=norm_weight, norm_bias=norm_bias, qkv_weight=qkv_weight)
    if x.dtype != torch.float64:
        expect_dtype(OP, torch.float32, sin=sin, cos=cos)


def _fake(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], len(others[2]) // 3)


def _flops(direction: str, x: Tensor, *others: Any) -> int:
    (batch, tokens, c), outputs, sites = x.shape, len(others[2]), others[5]
    attention = costs.attention(batch * tokens // sites, sites, sites, outputs // 3)
    return costs.linear(batch * tokens, c, outputs) + attention


_forwards = register_by_reference(
    OP,
    OP,
    "forward",
    schema="(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor sin, Tensor cos, int sites, "
    "int heads, float eps, str backend) -> Tensor",
    check=_check,
    fake=_fake,
    flops=_flops,
)


def fuses_space_attention_heads(x: Tensor, sites: int, heads: int, weights: tuple[Tensor, ...] = ()) -> bool:
    """Whether `space_attention_heads` should take x (B, T H W, C) with its `weights`, in order, by the rule of
    `pvdm_fast.ops.fusing`: without a gradient, from 8192 tokens on, if a frame has 64 of them at least."""
    return sites >= LEAST_SITES and fuses(OP, x, weights, x, *weights, None, None, sites, heads)


def space_attention_heads(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    sin: Tensor,
    cos: Tensor,
    *,
    sites: int,
    heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """Pre-norm attention inside frames, as far as the heads' results: `feed_forward_block` takes them. For inference.

    attention(qkv(LayerNorm(x))), where attention is `axial_attention` along "space" with the tables.

    Args:
        x: (B, T H W, C), any strides: the lattice, time slowest. float32, bfloat16 or float16, like all weights.
        norm_weight, norm_bias: (C).
        qkv_weight: (3 inner, C): queries, keys, values, each of all heads.
        sin, cos: (H W, inner / heads), float32: the rotation of queries and keys.
        sites: H W, the tokens of a frame. heads: of which inner is an even multiple. eps: of the norm.

    Returns:
        (B, T H W, inner), contiguous.

    Raises:
        ValueError: shapes or dtypes don't fit.

    Precision: statistics, the softmax and sums are in float32 at least.
    Derivatives: every kind, computed by the reference: there is no kernel for a gradient. `vmap` runs the operation for
        each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, triton (heads of at most 64 channels, at most 16384 channels or inner).
    """
    return _forwards(x, norm_weight, norm_bias, qkv_weight, sin, cos, sites, heads, eps, choice.requested())

"""The time attention of a layer of the autoencoder, with its norm and residual, as one operation, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.ops import costs
from pvdm_fast.ops.fusing import fuses
from pvdm_fast.ops.registry import expect_dtype, expect_real, expect_shapes, register_by_reference

OP = "time_attention_block"


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    sin: Tensor,
    cos: Tensor,
    time: int,
    heads: int,
    eps: float,
) -> None:
    weights = (norm_weight, norm_bias, qkv_weight, out_weight, out_bias)
    expect_real(OP, x, *weights, sin, cos)
    if x.dim() != 3 or x.numel() == 0 or time < 1 or x.shape[1] % time:
        raise ValueError(f"{OP}: x must be (B, T H W, C) with T = {time}, and not empty, not {tuple(x.shape)}.")
    if out_weight.dim() != 2 or out_weight.shape[1] == 0 or heads < 1 or out_weight.shape[1] % (2 * heads):
        raise ValueError(
            f"{OP}: out_weight must be (C, inner), and inner an even multiple of {heads} heads, not "
            f"{tuple(out_weight.shape)}."
        )
    c, inner = x.shape[2], out_weight.shape[1]
    shapes, expected = [tuple(t.shape) for t in weights], [(c,), (c,), (3 * inner, c), (c, inner), (c,)]
    if shapes != expected:
        raise ValueError(f"{OP}: the weights must have shapes {expected}, but have {shapes}.")
    if any(t.dtype != x.dtype for t in weights):
        raise ValueError(f"{OP}: the weights must be {x.dtype} as x, but are {[t.dtype for t in weights]}.")
    expect_shapes(OP, sin=(sin, (time, inner // heads)), cos=(cos, (time, inner // heads)))
    if x.dtype != torch.float64:
        expect_dtype(OP, torch.float32, sin=sin, cos=cos)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _flops(direction: str, x: Tensor, *others: Any) -> int:
    (batch, tokens, c), inner, time = x.shape, others[3].shape[1], others[7]
    attention = costs.attention(batch * tokens // time, time, time, inner)
    return costs.linear(batch * tokens, c, 4 * inner) + attention


_TENSORS = "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor out_weight, Tensor out_bias"
_forwards = register_by_reference(
    OP,
    OP,
    "forward",
    schema=f"({_TENSORS}, Tensor sin, Tensor cos, int time, int heads, float eps, str backend) -> Tensor",
    check=_check,
    fake=_fake,
    flops=_flops,
)


def fuses_time_attention_block(x: Tensor, time: int, weights: tuple[Tensor, ...] = ()) -> bool:
    """Whether `time_attention_block` should take x (B, T H W, C) with its `weights`, in order, by the rule of
    `pvdm_fast.ops.fusing`: without a gradient, from 8192 tokens on."""
    return fuses(OP, x, weights, x, *weights, None, None, time)


def time_attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    sin: Tensor,
    cos: Tensor,
    *,
    time: int,
    heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """Pre-norm attention along time, and its residual. For inference.

    x + out(attention(qkv(LayerNorm(x)))), where attention is `axial_attention` along "time" with the tables.

    Args:
        x: (B, T H W, C), any strides: the lattice, time slowest. float32, bfloat16 or float16, like all weights.
        norm_weight, norm_bias: (C).
        qkv_weight: (3 inner, C): queries, keys, values, each of all heads.
        out_weight, out_bias: (C, inner), (C).
        sin, cos: (T, inner / heads), float32: the rotation of queries and keys.
        time: T. heads: of which inner is an even multiple. eps: of the norm.

    Returns:
        (B, T H W, C), contiguous.

    Raises:
        ValueError: shapes or dtypes don't fit.

    Precision: statistics, the softmax and sums are in float32 at least. In Triton a value that isn't finite also makes
        neighbouring sequences NaN, those of its tile, be they another clip's.
    Derivatives: every kind, computed by the reference: there is no kernel for a gradient. `vmap` runs the operation for
        each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, triton (T at most 64, at most 16384 channels or inner; not on AMD's GPUs).
    """
    tensors = (x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, sin, cos)
    return _forwards(*tensors, time, heads, eps, choice.requested())

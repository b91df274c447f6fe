"""All that follows space attention in a layer of the autoencoder, as one operation, for inference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.ops import costs
from pvdm_fast.ops.fusing import fuses
from pvdm_fast.ops.registry import expect_real, register_by_reference

OP = "feed_forward_block"


def _check(
    x: Tensor,
    attended: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    eps: float,
) -> None:
    others = (attended, out_weight, out_bias, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias)
    expect_real(OP, x, *others)
    if x.dim() != 3 or attended.dim() != 3 or 0 in (x.numel(), attended.numel()):
        raise ValueError(
            f"{OP}: x must be (B, N, C) and attended (B, N, inner), not empty, not {tuple(x.shape)} and "
            f"{tuple(attended.shape)}."
        )
    if down_weight.dim() != 2 or down_weight.shape[1] == 0:
        raise ValueError(f"{OP}: down_weight must be (C, hidden) and not empty, not {tuple(down_weight.shape)}.")
    (batch, tokens, c), inner, hidden = x.shape, attended.shape[-1], down_weight.shape[1]
    shapes = [tuple(t.shape) for t in others]
    expected = [(batch, tokens, inner), (c, inner), (c,), (c,), (c,), (2 * hidden, c), (2 * hidden,), (c, hidden), (c,)]
    if shapes != expected:
        raise ValueError(f"{OP}: attended and the weights must have shapes {expected}, but have {shapes}.")
    if any(t.dtype != x.dtype for t in others):
        raise ValueError(f"{OP}: attended and the weights must be {x.dtype} as x, but are {[t.dtype for t in others]}.")


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _flops(direction: str, x: Tensor, attended: Tensor, *others: Any) -> int:
    (batch, tokens, c), (_, hidden) = x.shape, others[6].shape
    return costs.linear(batch * tokens, c, attended.shape[-1] + 3 * hidden)


_TENSORS = "Tensor x, Tensor attended, Tensor out_weight, Tensor out_bias, Tensor norm_weight, Tensor norm_bias"
_forwards = register_by_reference(
    OP,
    OP,
    "forward",
    schema=f"({_TENSORS}, Tensor up_weight, Tensor up_bias, Tensor down_weight, Tensor down_bias, float eps, "
    "str backend) -> Tensor",
    check=_check,
    fake=_fake,
    flops=_flops,
)


def fuses_feed_forward_block(x: Tensor, weights: tuple[Tensor, ...] = ()) -> bool:
    """Whether `feed_forward_block` should take x (B, N, C) with its `weights`, in order, by the rule of
    `pvdm_fast.ops.fusing`: without a gradient, from 8192 tokens on."""
    return fuses(OP, x, weights, x, x, *weights)


def feed_forward_block(
    x: Tensor,
    attended: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """What follows attention in a pre-norm layer. For inference.

    y = x + out(attended), and y + down(geglu(up(LayerNorm(y)))) is the result.

    Args:
        x: (B, N, C), any strides. float32, bfloat16 or float16, like all others.
        attended: (B, N, inner): the heads' results.
        out_weight, out_bias: (C, inner), (C).
        norm_weight, norm_bias: (C).
        up_weight, up_bias: (2 hidden, C), (2 hidden): values, then gates.
        down_weight, down_bias: (C, hidden), (C).
        eps: of the norm.

    Returns:
        (B, N, C), contiguous.

    Raises:
        ValueError: shapes or dtypes don't fit.

    Precision: y and sums are in float32 at least.
    Derivatives: every kind, computed by the reference: there is no kernel for a gradient. `vmap` runs the operation for
        each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, triton (at most 32768 channels, inner or hidden; not on AMD's GPUs).
    """
    weights = (out_weight, out_bias, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias)
    return _forwards(x, attended, *weights, eps, choice.requested())

"""Attention inside segments of the token axis: one segment is cross-plane attention, a layout's offsets in-plane."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pvdm_fast.backends import choice
from pvdm_fast.ops import costs
from pvdm_fast.ops.derivatives import by_reference, records, split_dual
from pvdm_fast.ops.registry import (
    autocast,
    default_scale,
    expect_dtype,
    expect_real,
    expect_shapes,
    reference,
    register,
    register_by_reference,
    statistic,
)


def _check(qkv: Tensor, offsets: Sequence[int], scale: float) -> None:
    expect_real("segment_attention", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.numel() == 0:
        raise ValueError(
            f"segment_attention: qkv must be (B, N, 3, heads, d) and not empty, but has shape {tuple(qkv.shape)}."
        )
    tokens = qkv.shape[1]
    rising = len(offsets) > 1 and all(start < stop for start, stop in pairwise(offsets))
    if not rising or offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(
            f"segment_attention: offsets must rise from 0 to the number of tokens, {tokens}, but are {list(offsets)}."
        )


def _backward_check(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Sequence[int], scale: float) -> None:
    _check(qkv, offsets, scale)
    expect_real("segment_attention", qkv, grad, out, lse)
    batch, tokens, _, heads, width = qkv.shape
    expect_dtype("segment_attention", qkv.dtype, grad=grad, out=out)
    expect_dtype("segment_attention", statistic(qkv.dtype), lse=lse)
    shape = (batch, tokens, heads, width)
    expect_shapes("segment_attention", grad=(grad, shape), out=(out, shape), lse=(lse, (batch, heads, tokens)))


def _jvp_check(qkv: Tensor, tangent: Tensor, offsets: Sequence[int], scale: float) -> None:
    _check(qkv, offsets, scale)
    expect_real("segment_attention", qkv, tangent)
    expect_dtype("segment_attention", qkv.dtype, tangent=tangent)
    expect_shapes("segment_attention", tangent=(tangent, tuple(qkv.shape)))


def _fake(qkv: Tensor, offsets: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    lse = qkv.new_empty(batch, heads, tokens, dtype=statistic(qkv.dtype))
    return qkv.new_empty(batch, tokens, heads, width), lse


def _backward_fake(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offsets: Sequence[int], scale: float) -> Tensor:
    return torch.empty_like(qkv)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.offsets, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    dqkv = _backwards(grad, *ctx.saved_tensors, ctx.offsets, ctx.scale, ctx.backend)
    return dqkv, None, None, None


def _jvp_fake(qkv: Tensor, tangent: Tensor, offsets: Sequence[int], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _fake(qkv, offsets, scale)
    return out, lse, torch.empty_like(out)


def _forward_mode(qkv: Tensor, offsets: Sequence[int], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    if records(qkv):
        return by_reference("segment_attention", "its forward-mode derivative", _compute)(qkv, offsets, scale, backend)
    primal, tangent = split_dual(qkv)
    out, lse, dout = _jvp(primal, tangent, offsets, scale, backend)
    return forward_ad.make_dual(out, dout, level=0), lse


def _compute(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    return reference("segment_attention").forward(*inputs)


def _flops(direction: str, *inputs: Any) -> int:
    qkv, offsets = inputs[direction == "backward"], inputs[-2]
    batch, _, _, heads, width = qkv.shape
    forward = sum(
        costs.attention(batch, stop - start, stop - start, heads * width) for start, stop in pairwise(offsets)
    )
    return costs.attention_passes(direction, forward)


_forwards, _backwards = register(
    "segment_attention",
    schema="(Tensor qkv, int[] offsets, float scale, str backend) -> (Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int[] offsets, float scale, str backend)"
    " -> Tensor",
    check=_check,
    backward_check=_backward_check,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
    forward_mode=_forward_mode,
)
_jvp = register_by_reference(
    "segment_attention",
    "segment_attention_jvp",
    "jvp",
    schema="(Tensor qkv, Tensor tangent, int[] offsets, float scale, str backend) -> (Tensor, Tensor, Tensor)",
    check=_jvp_check,
    fake=_jvp_fake,
    flops=_flops,
)


def segment_attention(qkv: Tensor, offsets: Sequence[int] | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention inside each segment of the token axis, heads apart (PVDM, section 3.2).

    Args:
        qkv: (B, N, 3, heads, d), any strides, float32, bfloat16 or float16 (float64 on `reference`). Queries, keys and
            values are one buffer, so their gradient is one too. Differentiable.
        offsets: where segments start, and the end: (0, n1, ..., N). With None there is one segment: every token attends
            to all.
        scale: factor of the scores. None means d ** -0.5.

    Returns:
        (B, N, heads, d), contiguous.

    Large scores: float32 rounds a score s by 6e-8 |s|, and a softmax takes that as an absolute error. Rows of -inf give
    NaN. The cpu kernels are as exact as the float32 formula at any size. The cuda kernels compute the backward pass's
    probabilities from a float32 log-sum-exp, so these are off by up to 2e-7 |s|.

    Raises:
        ValueError: shapes or offsets don't fit.

    Derivatives: reverse mode once by the backend's kernel. Forward mode (jvp), double backward, Hessian-vector products
        and `torch.func` work on every backend, computed by the reference. A log line says so once. If only qkv carries
        a tangent, `cpu` has its own jvp kernel with O(N) memory. `vmap` runs the operation for each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, cpu, triton, cuda.
    """
    (qkv,) = autocast(qkv)
    if offsets is None:
        offsets = [0, qkv.shape[1]] if qkv.dim() > 1 else []
    scale = default_scale(qkv) if scale is None else scale
    return _forwards(qkv, offsets, scale, choice.requested())[0]

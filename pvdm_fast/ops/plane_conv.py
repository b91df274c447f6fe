"""The 3 x 3 convolution that packed planes share, with zeros outside each plane's own edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.backends.rows import order_of
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.ops import costs
from pvdm_fast.ops.registry import autocast, expect_dtype, expect_real, expect_shapes, register, tokens_of_planes


def _check(x: Tensor, weight: Tensor, bias: Tensor, planes: Sequence[int], residual: Tensor | None) -> None:
    _check_weight(x, weight, bias.dtype, planes)
    expect_real("plane_conv", x, bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"plane_conv: bias must be ({weight.shape[0]},) as weight's first axis, not {tuple(bias.shape)}."
        )
    if residual is not None:
        expect_real("plane_conv", x, residual)
        expect_dtype("plane_conv", x.dtype, residual=residual)
        expect_shapes("plane_conv", residual=(residual, (*x.shape[:2], weight.shape[0])))


def _check_weight(x: Tensor, weight: Tensor, bias: torch.dtype, planes: Sequence[int]) -> None:
    expect_real("plane_conv", x, weight)
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"plane_conv: x must be (B, N, C), not empty; got {tuple(x.shape)}.")
    tokens, channels = x.shape[1:]
    if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3) or weight.numel() == 0:
        raise ValueError(
            f"plane_conv: for {channels} channels weight must be (C', {channels}, 3, 3) and bias (C'), not "
            f"{tuple(weight.shape)}."
        )
    if x.dtype != weight.dtype or x.dtype != bias:
        raise ValueError(
            f"plane_conv: all must have one dtype, but x is {x.dtype}, weight {weight.dtype}, bias {bias}."
        )
    if tokens_of_planes("plane_conv", planes) != tokens:
        raise ValueError(f"plane_conv: x has {tokens} tokens, which planes of sizes {list(planes)} don't hold.")


def _backward_check(grad: Tensor, x: Tensor, weight: Tensor, planes: Sequence[int], needs: Sequence[bool]) -> None:
    _check_weight(x, weight, x.dtype, planes)
    expect_real("plane_conv", x, grad)
    expect_dtype("plane_conv", x.dtype, grad=grad)
    expect_shapes("plane_conv", grad=(grad, (*x.shape[:2], weight.shape[0])))


def _flops(direction: str, *inputs: Any) -> int:
    x, weight = inputs[:2] if direction == "forward" else inputs[1:3]
    forward = costs.conv(x.shape[0] * x.shape[1], weight.shape[1], weight.shape[0])
    return forward if direction == "forward" else forward * sum(inputs[-1])


def _fake(x: Tensor, weight: Tensor, bias: Tensor, planes: Sequence[int], residual: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, planes: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs[0] else (0,))
    dweight = torch.empty_like(weight, memory_format=order_of(weight)) if needs[1] else weight.new_empty(0)
    return dx, dweight, grad.new_empty(weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.planes, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:2])
    dx, dweight, dbias = _backwards(grad, *ctx.saved_tensors, ctx.planes, needs, ctx.backend)
    residual = grad if ctx.needs_input_grad[4] else None
    return dx if needs[0] else None, dweight if needs[1] else None, dbias, None, residual, None


_forwards, _backwards = register(
    "plane_conv",
    schema="(Tensor x, Tensor weight, Tensor bias, int[] planes, Tensor? residual, str backend) -> Tensor",
    backward_schema="(Tensor grad, Tensor x, Tensor weight, int[] planes, bool[2] needs,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    check=_check,
    backward_check=_backward_check,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)


def plane_conv(x: Tensor, layout: PlaneLayout, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """3 x 3 convolution of each plane with shared weights, and the sum with a residual.

    Args:
        x: (B, N, C) packed tokens of `layout`. Differentiable, as are the next three.
        weight: (C', C, 3, 3), bias: (C'), in the dtype of x (autocast casts all). On a GPU weights in channels_last are
            read as they are, others are copied at each call. The weight's gradient is in its order of memory.
        residual: (B, N, C'), added to the result, in the dtype of x. None: nothing is added.

    Returns:
        (B, N, C'), contiguous.

    Raises:
        ValueError: shapes or dtypes don't fit.

    Derivatives: reverse mode once by the backend's kernel. Forward mode (jvp), double backward, Hessian-vector products
        and `torch.func` work on every backend, computed by the reference. A log line says so once. `vmap` runs the
        operation for each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, cpu, triton.
    """
    if x.dim() == 3 and x.numel() > 0:
        layout.check(x)
    if residual is None:
        x, weight, bias = autocast(x, weight, bias)
    else:
        x, weight, bias, residual = autocast(x, weight, bias, residual)
    return _forwards(x, weight, bias, layout.sizes, residual, choice.requested())

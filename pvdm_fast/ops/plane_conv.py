"""The 3 x 3 convolution that packed planes share, with zeros outside each plane's own edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.ops.registry import autocast, expect, expect_real, register


def _fake(x: Tensor, weight: Tensor, bias: Tensor, planes: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, planes: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs[0] else (0,))
    dweight = weight.new_empty(weight.shape if needs[1] else (0,))
    return dx, dweight, grad.new_empty(weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.planes, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:2])
    dx, dweight, dbias = torch.ops.pvdm_fast.plane_conv_backward(
        grad, *ctx.saved_tensors, ctx.planes, needs, ctx.backend
    )
    return dx if needs[0] else None, dweight if needs[1] else None, dbias, None, None


register(
    "plane_conv",
    schema="(Tensor x, Tensor weight, Tensor bias, int[] planes, str backend) -> Tensor",
    backward_schema="(Tensor grad, Tensor x, Tensor weight, int[] planes, bool[2] needs,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def plane_conv(x: Tensor, layout: PlaneLayout, weight: Tensor, bias: Tensor) -> Tensor:
    """3 x 3 convolution of each plane with shared weights.

    Args:
        x: (B, N, C) packed tokens of `layout`. Differentiable, as are the next two.
        weight: (C', C, 3, 3), bias: (C'), in the dtype of x (autocast casts all three).

    Returns:
        (B, N, C'), contiguous.

    Raises:
        ValueError: shapes or dtypes that don't fit.
    """
    expect_real("plane_conv", x, weight, bias)
    expect(x.dim() == 3 and x.numel() > 0, f"plane_conv: x must be (B, N, C), not empty; got {tuple(x.shape)}.")
    layout.check(x)
    x, weight, bias = autocast(x, weight, bias)
    expect(
        weight.shape[1:] == (x.shape[-1], 3, 3) and bias.shape == weight.shape[:1] and weight.numel() > 0,
        f"plane_conv: for {x.shape[-1]} channels weight must be (C', {x.shape[-1]}, 3, 3) and bias (C'), "
        f"not {tuple(weight.shape)} and {tuple(bias.shape)}.",
    )
    expect(x.dtype == weight.dtype == bias.dtype, f"plane_conv: x is {x.dtype}, but weight {weight.dtype}.")
    return torch.ops.pvdm_fast.plane_conv(x, weight, bias, layout.sizes, choice.requested())

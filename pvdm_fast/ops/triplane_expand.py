"""From three planes back to a lattice: their 1 x 1 convolutions and broadcast sum, the lattice written once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.ops.registry import autocast, expect, expect_real, register


def _fake(planes: Tensor, weight: Tensor, bias: Tensor, time: int, height: int, width: int) -> Tensor:
    return planes.new_empty(planes.shape[0], time * height * width, weight.shape[1])


def _backward_fake(
    grad: Tensor, planes: Tensor, weight: Tensor, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        planes.new_empty(planes.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[:2]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    planes, weight, _, *ctx.sizes, ctx.backend = inputs
    ctx.save_for_backward(planes, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradients = torch.ops.pvdm_fast.triplane_expand_backward(grad, *ctx.saved_tensors, *ctx.sizes, ctx.backend)
    return *gradients, None, None, None, None


register(
    "triplane_expand",
    schema="(Tensor planes, Tensor weight, Tensor bias, int time, int height, int width, str backend) -> Tensor",
    backward_schema="(Tensor grad, Tensor planes, Tensor weight, int time, int height, int width, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def triplane_expand(planes: Tensor, layout: TriplaneLayout, weight: Tensor, bias: Tensor) -> Tensor:
    """lattice[t, h, w] = xy[h, w] W_xy' + yt[t, w] W_yt' + xt[t, h] W_xt' + biases (PVDM, section 3.1).

    Args:
        planes: (B, N, D) packed tokens of `layout`. Differentiable, as are the next two.
        weight: (3, C, D) and bias: (3, C), planes in packed order xy, yt, xt, in the dtype of planes (autocast casts).

    Returns:
        (B, T H W, C), contiguous, tokens in the order (t, h, w).

    Raises:
        ValueError: shapes or dtypes that don't fit.
    """
    expect_real("triplane_expand", planes, weight, bias)
    expect(
        planes.dim() == 3 and planes.numel() > 0,
        f"triplane_expand: planes must be (B, N, D), not empty; got {tuple(planes.shape)}.",
    )
    layout.check(planes)
    expect(
        weight.dim() == 3 and weight.shape[0] == 3 and weight.shape[2] == planes.shape[2]
        and bias.shape == weight.shape[:2] and weight.numel() > 0,
        f"triplane_expand: weight must be (3, C, {planes.shape[2]}) and bias (3, C), not {tuple(weight.shape)} and "
        f"{tuple(bias.shape)}.",
    )  # fmt: skip
    planes, weight, bias = autocast(planes, weight, bias)
    expect(
        planes.dtype == weight.dtype == bias.dtype,
        f"triplane_expand: planes are {planes.dtype}, but weight {weight.dtype}.",
    )
    return torch.ops.pvdm_fast.triplane_expand(
        planes, weight, bias, layout.time, layout.height, layout.width, choice.requested()
    )

"""The gated activation of the TimeSformer's feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.ops.registry import expect, expect_real, register


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _backward_fake(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.pvdm_fast.geglu_backward(grad, *ctx.saved_tensors, ctx.backend), None


register(
    "geglu",
    schema="(Tensor x, str backend) -> Tensor",
    backward_schema="(Tensor grad, Tensor x, str backend) -> Tensor",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def geglu(x: Tensor) -> Tensor:
    """value * GELU(gate) of the halves (value | gate) of the last axis; GELU in its erf form (Shazeer 2020).

    Args:
        x: (..., 2M). Differentiable.

    Returns:
        (..., M), contiguous.

    Raises:
        ValueError: the last axis is odd or x is empty.
    """
    expect_real("geglu", x)
    expect(
        x.dim() > 0 and x.numel() > 0 and x.shape[-1] % 2 == 0,
        f"geglu: the last axis must be even and x not empty, but its shape is {tuple(x.shape)}.",
    )
    return torch.ops.pvdm_fast.geglu(x, choice.requested())

"""Residual sum and LayerNorm in one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.backends.rows import as_dtype
from pvdm_fast.ops import costs
from pvdm_fast.ops.registry import expect_dtype, expect_real, expect_shapes, register, statistic


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> None:
    expect_real("add_layer_norm", x, residual, weight, bias)
    if residual is not None and residual.dtype == torch.float64:
        expect_dtype("add_layer_norm", torch.float64, x=x)
    if (
        x.dim() == 0
        or x.numel() == 0
        or weight.shape != x.shape[-1:]
        or bias.shape != x.shape[-1:]
        or (residual is not None and residual.shape != x.shape)
    ):
        raise ValueError(
            f"add_layer_norm: x must not be empty; it is {tuple(x.shape)}, so a residual must have that shape, and "
            "weight and bias its last."
        )


def _backward_check(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> None:
    expect_real("add_layer_norm", total, grad_normed, mean, rstd)
    expect_dtype("add_layer_norm", total.dtype, grad_normed=grad_normed, grad_total=grad_total)
    _check(total, grad_total, weight, weight, 0.0)
    expect_dtype("add_layer_norm", statistic(total.dtype), mean=mean, rstd=rstd)
    rows = total.shape[:-1]
    expect_shapes("add_layer_norm", grad_normed=(grad_normed, total.shape), mean=(mean, rows), rstd=(rstd, rows))


def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = x if residual is None else residual
    total = x.new_empty(0) if residual is None else like.new_empty(x.shape)
    mean = x.new_empty(x.shape[:-1], dtype=statistic(like.dtype))
    return total, like.new_empty(x.shape), mean, torch.empty_like(mean)


def _backward_fake(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, _, ctx.backend = inputs
    total, _, mean, rstd = output
    ctx.x_dtype = x.dtype
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, weight, mean, rstd = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(total)
    if not ctx.has_residual:
        grad_total = None
    dtotal, dweight, dbias = _backwards(grad_normed, grad_total, total, weight, mean, rstd, ctx.backend)
    return as_dtype(dtotal, ctx.x_dtype), dtotal if ctx.has_residual else None, dweight, dbias, None, None


_forwards, _backwards = register(
    "add_layer_norm",
    schema="(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor weight, Tensor mean, Tensor rstd,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    check=_check,
    backward_check=_backward_check,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=costs.none,
)


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The residual sum x + residual, and its LayerNorm over the last axis.

    Args:
        x: (..., C). Differentiable, as are the next three.
        residual: (..., C). With None, x alone is normed.
        weight, bias: (C).

    Returns:
        The sum (x itself without a residual) and its norm, both (..., C), in the dtype of the residual, or of x without
        one.

    Raises:
        ValueError: shapes don't fit.

    Derivatives: reverse mode once by the backend's kernel. Forward mode (jvp), double backward, Hessian-vector products
        and `torch.func` work on every backend, computed by the reference. A log line says so once. `vmap` runs the
        operation for each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, cpu, triton.
    """
    if residual is not None and residual.dtype == torch.float64:
        x = x.double()  # their sum is float64, which is computed where x is float64
    total, normed, _, _ = _forwards(x, residual, weight, bias, eps, choice.requested())
    return (x if residual is None else total), normed

"""The gated activation of the TimeSformer's feed-forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.ops import costs
from pvdm_fast.ops.registry import expect_dtype, expect_real, expect_shapes, register


def _check(x: Tensor) -> None:
    expect_real("geglu", x)
    if x.dim() == 0 or x.numel() == 0 or x.shape[-1] % 2:
        raise ValueError(f"geglu: the last axis must be even and x not empty, but its shape is {tuple(x.shape)}.")


def _backward_check(grad: Tensor, x: Tensor) -> None:
    _check(x)
    expect_real("geglu", x, grad)
    expect_dtype("geglu", x.dtype, grad=grad)
    expect_shapes("geglu", grad=(grad, (*x.shape[:-1], x.shape[-1] // 2)))


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _backward_fake(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _backwards(grad, *ctx.saved_tensors, ctx.backend), None


_forwards, _backwards = register(
    "geglu",
    schema="(Tensor x, str backend) -> Tensor",
    backward_schema="(Tensor grad, Tensor x, str backend) -> Tensor",
    check=_check,
    backward_check=_backward_check,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=costs.none,
)


def geglu(x: Tensor) -> Tensor:
    """value * GELU(gate) of the halves (value | gate) of the last axis; GELU in its erf form (Shazeer 2020).

    Args:
        x: (..., 2M). Differentiable.

    Returns:
        (..., M), contiguous.

    Raises:
        ValueError: the last axis is odd or x is empty.

    Derivatives: reverse mode once by the backend's kernel. Forward mode (jvp), double backward, Hessian-vector products
        and `torch.func` work on every backend, computed by the reference. A log line says so once. `vmap` runs the
        operation for each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, cpu, triton.
    """
    return _forwards(x, choice.requested())

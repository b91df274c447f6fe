"""Sequences along one axis of a lattice, with a learned token appended and learned positions added."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.ops import costs
from pvdm_fast.ops.registry import expect_real, register, sequence_length, tokens_of_lattice


def _check_parameters(channels: int, token: Tensor, positions: Tensor, plane: str, length: int) -> None:
    if token.shape != (channels,) or positions.shape != (length + 1, channels):
        raise ValueError(
            f"triplane_slice: for plane {plane}, token must be ({channels},) and positions ({length + 1}, {channels}), "
            f"not {tuple(token.shape)} and {tuple(positions.shape)}."
        )


def _check(x: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int) -> None:
    expect_real("triplane_slice", x, token, positions)
    length = sequence_length("triplane_slice", plane, time, height, width)
    lattice, _ = tokens_of_lattice("triplane_slice", time, height, width)
    if x.dim() != 3 or x.numel() == 0 or x.shape[1] != lattice:
        raise ValueError(
            f"triplane_slice: x must be (B, {lattice}, C) for a lattice {(time, height, width)} and not empty, not "
            f"{tuple(x.shape)}."
        )
    _check_parameters(x.shape[-1], token, positions, plane, length)


def _backward_check(
    grad: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int
) -> None:
    expect_real("triplane_slice", grad, token, positions)
    length = sequence_length("triplane_slice", plane, time, height, width)
    lattice, _ = tokens_of_lattice("triplane_slice", time, height, width)
    if grad.dim() != 4 or grad.numel() == 0 or grad.shape[1:3] != (lattice // length, length + 1):
        raise ValueError(
            f"triplane_slice: grad must be (B, {lattice // length}, {length + 1}, C), not {tuple(grad.shape)}."
        )
    _check_parameters(grad.shape[-1], token, positions, plane, length)


def _fake(x: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int) -> Tensor:
    length = positions.shape[0]
    return x.new_empty(x.shape[0], x.shape[1] // (length - 1), length, x.shape[2])


def _backward_fake(
    grad: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    dx = grad.new_empty(grad.shape[0], grad.shape[1] * (grad.shape[2] - 1), grad.shape[3])
    return dx, token.new_empty(token.shape), positions.new_empty(positions.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, token, positions, *ctx.where, ctx.backend = inputs
    ctx.save_for_backward(token, positions)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradients = _backwards(grad, *ctx.saved_tensors, *ctx.where, ctx.backend)
    return *gradients, None, None, None, None, None


_forwards, _backwards = register(
    "triplane_slice",
    schema="(Tensor x, Tensor token, Tensor positions, str plane, int time, int height, int width, str backend)"
    " -> Tensor",
    backward_schema="(Tensor grad, Tensor token, Tensor positions, str plane, int time, int height, int width,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    check=_check,
    backward_check=_backward_check,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=costs.none,
)


def triplane_slice(x: Tensor, layout: TriplaneLayout, plane: str, token: Tensor, positions: Tensor) -> Tensor:
    """The sequences that the projection to one plane reads (PVDM, section 3.1).

    Args:
        x: (B, T H W, C) lattice tokens in the order (t, h, w). Differentiable.
        plane: "xy" (sequences along time, one for each h, w), "yt" (along height), "xt" (along width).
        token: (C), appended at the end of each sequence. Differentiable.
        positions: (L + 1, C), added. L is the length of the collapsed axis. Differentiable.

    Returns:
        (B, sites, L + 1, C), contiguous, in the dtype of x. Sites have the order of the plane's packed tokens.

    Raises:
        ValueError: shapes don't fit, or the plane is unknown.

    Derivatives: reverse mode once by the backend's kernel. Forward mode (jvp), double backward, Hessian-vector products
        and `torch.func` work on every backend, computed by the reference. A log line says so once. `vmap` runs the
        operation for each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, cpu, triton, cuda.
    """
    return _forwards(x, token, positions, plane, layout.time, layout.height, layout.width, choice.requested())

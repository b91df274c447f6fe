"""Sequences along one axis of a lattice, with a learned token appended and learned positions added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.layout import PLANE_NAMES, TriplaneLayout
from pvdm_fast.ops.registry import expect, expect_real, register


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
    gradients = torch.ops.pvdm_fast.triplane_slice_backward(grad, *ctx.saved_tensors, *ctx.where, ctx.backend)
    return *gradients, None, None, None, None, None


register(
    "triplane_slice",
    schema="(Tensor x, Tensor token, Tensor positions, str plane, int time, int height, int width, str backend)"
    " -> Tensor",
    backward_schema="(Tensor grad, Tensor token, Tensor positions, str plane, int time, int height, int width,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def triplane_slice(x: Tensor, layout: TriplaneLayout, plane: str, token: Tensor, positions: Tensor) -> Tensor:
    """The sequences that the projection to one plane reads (PVDM, section 3.1).

    Args:
        x: (B, T H W, C) lattice tokens in the order (t, h, w). Differentiable.
        plane: "xy" (sequences along time, one for each h, w), "yt" (along height), "xt" (along width).
        token: (C), appended at the end of each sequence. Differentiable.
        positions: (L + 1, C), added; L is the length of the collapsed axis. Differentiable.

    Returns:
        (B, sites, L + 1, C), contiguous, in the dtype of x; sites in the order of the plane's packed tokens.

    Raises:
        ValueError: shapes that don't fit, an unknown plane.
    """
    expect_real("triplane_slice", x, token, positions)
    expect(plane in PLANE_NAMES, f"triplane_slice: plane must be one of {', '.join(PLANE_NAMES)}, not {plane!r}.")
    length = dict(xy=layout.time, yt=layout.height, xt=layout.width)[plane]
    expect(
        x.dim() == 3 and x.numel() > 0 and x.shape[1] == layout.num_lattice_tokens,
        f"triplane_slice: x must be (B, {layout.num_lattice_tokens}, C) for {layout} and not empty, "
        f"not {tuple(x.shape)}.",
    )
    channels = x.shape[-1]
    expect(
        token.shape == (channels,) and positions.shape == (length + 1, channels),
        f"triplane_slice: for plane {plane}, token must be ({channels},) and positions ({length + 1}, {channels}), "
        f"not {tuple(token.shape)} and {tuple(positions.shape)}.",
    )
    return torch.ops.pvdm_fast.triplane_slice(
        x, token, positions, plane, layout.time, layout.height, layout.width, choice.requested()
    )

"""From three planes back to a lattice: their 1 x 1 convolutions and broadcast sum, the lattice written once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.ops import costs
from pvdm_fast.ops.registry import autocast, expect_dtype, expect_real, expect_shapes, register, tokens_of_lattice


def _check(planes: Tensor, weight: Tensor, bias: Tensor, time: int, height: int, width: int) -> None:
    _check_weight(planes, weight, time, height, width)
    expect_real("triplane_expand", planes, bias)
    if bias.shape != weight.shape[:2]:
        raise ValueError(f"triplane_expand: bias must be {tuple(weight.shape[:2])}, not {tuple(bias.shape)}.")
    if bias.dtype != planes.dtype:
        raise ValueError(f"triplane_expand: planes are {planes.dtype}, but bias {bias.dtype}.")


def _check_weight(planes: Tensor, weight: Tensor, time: int, height: int, width: int) -> None:
    expect_real("triplane_expand", planes, weight)
    if planes.dim() != 3 or planes.numel() == 0:
        raise ValueError(f"triplane_expand: planes must be (B, N, D), not empty; got {tuple(planes.shape)}.")
    _, tokens = tokens_of_lattice("triplane_expand", time, height, width)
    if planes.shape[1] != tokens:
        raise ValueError(
            f"triplane_expand: planes hold {planes.shape[1]} tokens, those of a lattice {(time, height, width)} are "
            f"{tokens}."
        )
    depth = planes.shape[2]
    if weight.dim() != 3 or weight.shape[0] != 3 or weight.shape[2] != depth or weight.numel() == 0:
        raise ValueError(
            f"triplane_expand: weight must be (3, C, {depth}) and bias (3, C), but weight is {tuple(weight.shape)}."
        )
    if weight.dtype != planes.dtype:
        raise ValueError(f"triplane_expand: planes are {planes.dtype}, but weight {weight.dtype}.")


def _backward_check(grad: Tensor, planes: Tensor, weight: Tensor, time: int, height: int, width: int) -> None:
    _check_weight(planes, weight, time, height, width)
    expect_real("triplane_expand", planes, grad)
    expect_dtype("triplane_expand", planes.dtype, grad=grad)
    expect_shapes("triplane_expand", grad=(grad, (planes.shape[0], time * height * width, weight.shape[1])))


def _flops(direction: str, *inputs: Any) -> int:
    planes, weight = inputs[:2] if direction == "forward" else inputs[1:3]
    time, height, width = inputs[-3:]
    forward = costs.linear(planes.shape[0] * time * height * width, 3 * planes.shape[2], weight.shape[1])
    return forward if direction == "forward" else 2 * forward


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
    gradients = _backwards(grad, *ctx.saved_tensors, *ctx.sizes, ctx.backend)
    return *gradients, None, None, None, None


_forwards, _backwards = register(
    "triplane_expand",
    schema="(Tensor planes, Tensor weight, Tensor bias, int time, int height, int width, str backend) -> Tensor",
    backward_schema="(Tensor grad, Tensor planes, Tensor weight, int time, int height, int width, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    check=_check,
    backward_check=_backward_check,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)


def triplane_expand(planes: Tensor, layout: TriplaneLayout, weight: Tensor, bias: Tensor) -> Tensor:
    """lattice[t, h, w] = xy[h, w] W_xy' + yt[t, w] W_yt' + xt[t, h] W_xt' + biases (PVDM, section 3.1).

    Args:
        planes: (B, N, D) packed tokens of `layout`. Differentiable, as are the next two.
        weight: (3, C, D) and bias: (3, C), planes in packed order xy, yt, xt, in the dtype of planes (autocast casts).

    Returns:
        (B, T H W, C), contiguous, tokens in the order (t, h, w).

    Raises:
        ValueError: shapes or dtypes don't fit.

    Derivatives: reverse mode once by the backend's kernel. Forward mode (jvp), double backward, Hessian-vector products
        and `torch.func` work on every backend, computed by the reference. A log line says so once. `vmap` runs the
        operation for each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, cpu, triton, cuda.
    """
    if planes.dim() == 3 and planes.numel() > 0:
        layout.check(planes)
    planes, weight, bias = autocast(planes, weight, bias)
    return _forwards(planes, weight, bias, layout.time, layout.height, layout.width, choice.requested())

"""GroupNorm of packed planes, and what follows it in the denoiser: FiLM, SiLU, x2 resampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.ops import costs
from pvdm_fast.ops.plane_resample import STEPS, expect_resample, resampled
from pvdm_fast.ops.registry import expect_dtype, expect_real, expect_shapes, register, statistic, tokens_of_planes


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_shift: Tensor | None,
    planes: Sequence[int],
    groups: int,
    eps: float,
    activation: bool,
    resample: int,
) -> None:
    expect_real("plane_norm", x, weight, bias, scale_shift)
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"plane_norm: x must be (B, N, C), not empty; got {tuple(x.shape)}.")
    batch, tokens, channels = x.shape
    if groups < 1 or channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"plane_norm: x has {channels} channels, which {groups} groups must divide, and weight and bias must have "
            f"that length; they have shapes {tuple(weight.shape)} and {tuple(bias.shape)}."
        )
    if scale_shift is not None and scale_shift.shape != (batch, 2 * channels):
        raise ValueError(f"plane_norm: scale_shift must be ({batch}, {2 * channels}), not {tuple(scale_shift.shape)}.")
    if tokens_of_planes("plane_norm", planes) != tokens:
        raise ValueError(f"plane_norm: x has {tokens} tokens, which planes of sizes {list(planes)} don't hold.")
    expect_resample("plane_norm", planes, resample)


def _backward_check(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    planes: Sequence[int],
    groups: int,
    activation: bool,
    resample: int,
) -> None:
    _check(x, weight, bias, scale_shift, planes, groups, 0.0, activation, resample)
    expect_real("plane_norm", x, grad, mean, rstd)
    expect_dtype("plane_norm", x.dtype, grad=grad)
    expect_dtype("plane_norm", statistic(x.dtype), mean=mean, rstd=rstd)
    batch, _, channels = x.shape
    statistics = (batch, len(planes) // 2, groups)
    expect_shapes(
        "plane_norm",
        grad=(grad, (batch, resampled(x.shape[1], resample), channels)),
        mean=(mean, statistics),
        rstd=(rstd, statistics),
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_shift: Tensor | None,
    planes: Sequence[int],
    groups: int,
    eps: float,
    activation: bool,
    resample: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, channels = x.shape
    mean = x.new_empty(batch, len(planes) // 2, groups, dtype=statistic(x.dtype))
    return x.new_empty(batch, resampled(tokens, resample), channels), mean, torch.empty_like(mean)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dscale_shift = x.new_empty(0) if scale_shift is None else scale_shift.new_empty(scale_shift.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dscale_shift


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, scale_shift, ctx.planes, ctx.groups, _, ctx.activation, ctx.resample, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, scale_shift, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    dx, dweight, dbias, dscale_shift = _backwards(
        grad, *ctx.saved_tensors, ctx.planes, ctx.groups, ctx.activation, ctx.resample, ctx.backend
    )
    return dx, dweight, dbias, dscale_shift if ctx.needs_input_grad[3] else None, *[None] * 6


_forwards, _backwards = register(
    "plane_norm",
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? scale_shift, int[] planes, int groups,"
    " float eps, bool activation, int resample, str backend) -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? scale_shift, Tensor mean,"
    " Tensor rstd, int[] planes, int groups, bool activation, int resample,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    backward_check=_backward_check,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=costs.none,
)


def plane_norm(
    x: Tensor,
    layout: PlaneLayout,
    weight: Tensor,
    bias: Tensor,
    *,
    scale_shift: Tensor | None = None,
    groups: int = 32,
    eps: float = 1e-5,
    activation: bool = False,
    resample: str | None = None,
) -> Tensor:
    """GroupNorm, then scale and shift, then SiLU, then resampling of packed planes, in one operation.

    Args:
        x: (B, N, C) packed tokens of `layout`, float32, bfloat16, float16 or float64. Statistics are float32, or
            float64 for float64. Differentiable.
        layout: that of x: any number of planes of any sizes, each with its own statistics. PlaneLayout(((N, 1),)) norms
            all tokens jointly.
        weight, bias: (C), in any of these dtypes. Differentiable.
        scale_shift: (B, 2C), the halves (scale | shift): n (1 + scale) + shift. Differentiable.
        groups: of channels; divides C.
        activation: apply SiLU.
        resample: None, "up" (nearest, sides x2) or "down" (2 x 2 mean; every size of the layout must be even).

    Returns:
        (B, N', C) contiguous, in the dtype of x.

    Raises:
        ValueError: shapes don't fit, groups don't divide C, or a size to halve is odd.

    Derivatives: reverse mode once by the backend's kernel. Forward mode (jvp), double backward, Hessian-vector products
        and `torch.func` work on every backend, computed by the reference. A log line says so once. `vmap` runs the
        operation for each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, cpu, triton, cuda.
    """
    if resample is not None and resample not in STEPS:
        raise ValueError(f"plane_norm: resample must be None, 'up' or 'down', not {resample!r}.")
    if not isinstance(groups, (int, torch.SymInt)):
        raise ValueError(f"plane_norm: groups must be a whole number that divides the channels, not {groups!r}.")
    if x.dim() == 3 and x.numel() > 0:
        layout.check(x)
    if resample == "down":
        for size in layout.sizes:
            if size % 2:
                layout.downsample(2)  # says which size it is
    step = 0 if resample is None else STEPS[resample]
    arguments = (layout.sizes, groups, eps, activation, step, choice.requested())
    return _forwards(x, weight, bias, scale_shift, *arguments)[0]

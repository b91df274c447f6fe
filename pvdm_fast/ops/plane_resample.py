"""x2 resampling of packed planes: nearest upwards, 2 x 2 mean downwards. For the denoiser's skips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.ops import costs
from pvdm_fast.ops.registry import expect_real, register, tokens_of_planes

OP = "plane_resample"
STEPS = {"up": 1, "down": -1}


def resampled(tokens: int, resample: int) -> int:
    """How many tokens there are after a step up (1), down (-1) or none (0)."""
    return tokens * 4 if resample > 0 else tokens // 4 if resample < 0 else tokens


def expect_resample(op: str, planes: Sequence[int], resample: int) -> None:
    """Raise ValueError for what is no step, and where a size to halve is odd."""
    if resample not in (-1, 0, 1) or (resample < 0 and any(size % 2 for size in planes)):
        raise ValueError(
            f"{op}: resample must be 0, 1 (up) or, where all sizes are even, -1 (down); got {resample} for "
            f"planes of sizes {list(planes)}."
        )


def _check_tokens(x: Tensor, planes: Sequence[int], resample: int, after: bool) -> None:
    expect_real(OP, x)
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"{OP}: x must be (B, N, C), not empty; got {tuple(x.shape)}.")
    tokens = tokens_of_planes(OP, planes)
    expect_resample(OP, planes, resample)
    if resample == 0:
        raise ValueError(f"{OP}: resample must be 1 (up) or -1 (down), not 0.")
    if x.shape[1] != (resampled(tokens, resample) if after else tokens):
        raise ValueError(
            f"{OP}: planes of sizes {list(planes)} have {tokens} tokens, which {x.shape[1]} tokens don't fit."
        )


def _check(x: Tensor, planes: Sequence[int], resample: int) -> None:
    _check_tokens(x, planes, resample, after=False)


def _backward_check(grad: Tensor, planes: Sequence[int], resample: int) -> None:
    _check_tokens(grad, planes, resample, after=True)


def _fake(x: Tensor, planes: Sequence[int], resample: int) -> Tensor:
    return x.new_empty(len(x), resampled(x.shape[1], resample), x.shape[2])


def _backward_fake(grad: Tensor, planes: Sequence[int], resample: int) -> Tensor:
    return grad.new_empty(len(grad), resampled(grad.shape[1], -resample), grad.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.planes, ctx.resample, ctx.backend = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backwards(grad, ctx.planes, ctx.resample, ctx.backend), None, None, None


_forwards, _backwards = register(
    OP,
    schema="(Tensor x, int[] planes, int resample, str backend) -> Tensor",
    backward_schema="(Tensor grad, int[] planes, int resample, str backend) -> Tensor",
    check=_check,
    backward_check=_backward_check,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=costs.none,
)


def plane_resample(x: Tensor, layout: PlaneLayout, resample: str) -> Tensor:
    """x2 resampling of every plane of a packed buffer, as `plane_norm` does it after its norm.

    Args:
        x: (B, N, C) packed tokens of `layout`, float32, bfloat16, float16 or float64. Differentiable.
        layout: that of x: any number of planes of any sizes.
        resample: "up" (nearest, sides x2) or "down" (2 x 2 mean; every size of the layout must be even).

    Returns:
        (B, N', C) contiguous, in the dtype of x.

    Raises:
        ValueError: shapes don't fit, or a size to halve is odd.

    Derivatives: reverse mode once by the backend's kernel. Forward mode (jvp), double backward, Hessian-vector products
        and `torch.func` work on every backend, computed by the reference. A log line says so once. `vmap` runs the
        operation for each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, triton.
    """
    if resample not in STEPS:
        raise ValueError(f"{OP}: resample must be 'up' or 'down', not {resample!r}.")
    if x.dim() == 3 and x.numel() > 0:
        layout.check(x)
    if resample == "down" and any(size % 2 for size in layout.sizes):
        layout.downsample(2)  # says which size it is
    return _forwards(x, layout.sizes, STEPS[resample], choice.requested())

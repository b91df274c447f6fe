"""The projection of a lattice to one plane as one operation: slice, transformer layers, convolution, tanh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.backends.projection_layers import MATRICES, NAMES, ProjectionLayer
from pvdm_fast.errors import BackendError
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.ops import costs
from pvdm_fast.ops.derivatives import autocast_dtype, records, transforming
from pvdm_fast.ops.registry import (
    autocast,
    expect_dtype,
    expect_real,
    expect_shapes,
    register,
    sequence_length,
    tokens_of_lattice,
)

OP = "triplane_project"

# Wider than this and in bfloat16, the backward pass is no faster than that of the layers one by one: sums of weights'
# gradients go through the third cache once for every tile of 384 rows, which takes long beside products in bfloat16.
# Both passes, times as fast as the layers: on a Zen 5 with 1 and 2 threads 1.1 and 1.4 at 64 channels, 0.96 and 0.97 at
# 128, 0.85 and 0.88 at 192, 0.82 and 0.73 at 256. On one thread of a Xeon with AMX 1.11 at 192, 0.89 to 0.98 at 384
# (float32: 1.5, 1.6 to 1.7).
MOST_CHANNELS_IN_BFLOAT16 = 128

# What autocast casts: the parameters of linear layers and convolutions, as it does in PyTorch's own.
CAST = (*MATRICES, "out_bias", "up_bias", "down_bias", "latent_bias")
_TENSORS = ", ".join(f"Tensor {name}" for name in NAMES)
_NUMBERS = "str plane, int time, int height, int width, int heads, float eps, str backend"


def _check(x: Tensor, *arguments: Any) -> None:
    *tensors, plane, time, height, width, heads, _ = arguments
    expect_real(OP, x, *tensors)
    length = sequence_length(OP, plane, time, height, width)
    lattice, _ = tokens_of_lattice(OP, time, height, width)
    if x.dim() != 3 or x.numel() == 0 or x.shape[1] != lattice:
        raise ValueError(
            f"{OP}: x must be (B, {lattice}, C) for a lattice {(time, height, width)} and not empty, not "
            f"{tuple(x.shape)}."
        )
    named = dict(zip(NAMES, tensors, strict=True))
    up, out, latent = named["up_weight"], named["out_weight"], named["latent_weight"]
    if up.dim() != 3 or out.dim() != 3 or latent.dim() != 2 or 0 in (up.numel(), out.numel(), latent.numel()):
        raise ValueError(
            f"{OP}: up_weight must be (layers, hidden, C), out_weight (layers, C, inner), latent_weight (D, C), none "
            f"empty, not {tuple(up.shape)}, {tuple(out.shape)} and {tuple(latent.shape)}."
        )
    depth, hidden, c = up.shape[0], up.shape[1], x.shape[2]
    inner, outputs = out.shape[2], latent.shape[0]
    if heads < 1 or inner % heads:
        raise ValueError(f"{OP}: {heads} heads must divide the attention's inner width {inner}.")
    of_channels = ("norm1_weight", "norm1_bias", "out_bias", "norm2_weight", "norm2_bias", "down_bias")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(of_channels, (depth, c))
    shapes |= {"token": (c,), "positions": (length + 1, c), "qkv_weight": (depth, 3 * inner, c)}
    shapes |= {"out_weight": (depth, c, inner), "up_weight": (depth, hidden, c), "up_bias": (depth, hidden)}
    shapes |= {"down_weight": (depth, c, hidden), "latent_weight": (outputs, c), "latent_bias": (outputs,)}
    expect_shapes(OP, **{name: (named[name], shape) for name, shape in shapes.items()})
    expect_dtype(OP, named["qkv_weight"].dtype, **{name: named[name] for name in MATRICES})
    if (x.dtype == torch.float64) != (named["qkv_weight"].dtype == torch.float64):
        raise ValueError(f"{OP}: x is {x.dtype}, the matrices {named['qkv_weight'].dtype}: both float64, or neither.")


def _backward_check(grad: Tensor, x: Tensor, *arguments: Any) -> None:
    _check(x, *arguments)
    expect_real(OP, x, grad)
    expect_shapes(OP, grad=(grad, _shape(x, arguments)))


def _shape(x: Tensor, arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """Of the result."""
    return x.shape[0], x.shape[1] // (arguments[1].shape[0] - 1), arguments[len(NAMES) - 1].shape[0]


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return arguments[NAMES.index("qkv_weight")].new_empty(_shape(x, arguments))


def _backward_fake(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *(t.new_empty(t.shape) for t in arguments[: len(NAMES)])


def _flops(direction: str, *inputs: Any) -> int:
    x, *arguments = inputs if direction == "forward" else inputs[1:]
    named = dict(zip(NAMES, arguments, strict=False))
    (depth, hidden, c), inner = named["up_weight"].shape, named["out_weight"].shape[2]
    length = named["positions"].shape[0]
    sequences = x.shape[0] * x.shape[1] // (length - 1)
    forward = 0
    for layer in range(depth):
        queries = sequences * (1 if layer == depth - 1 else length)
        forward += costs.linear(sequences * length, c, 2 * inner) + costs.linear(queries, c, inner)
        forward += costs.attention(sequences, queries // sequences, length, inner)
        forward += costs.linear(queries, inner, c) + 2 * costs.linear(queries, c, hidden)
    forward += costs.linear(sequences, c, named["latent_weight"].shape[0])
    return forward if direction == "forward" else 2 * forward


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.rest = inputs[: len(NAMES) + 1], inputs[len(NAMES) + 1 :]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradients = _backwards(grad, *ctx.saved_tensors, *ctx.rest)
    return *gradients, *(None for _ in ctx.rest)


_forwards, _backwards = register(
    OP,
    schema=f"(Tensor x, {_TENSORS}, {_NUMBERS}) -> Tensor",
    backward_schema=f"(Tensor grad, Tensor x, {_TENSORS}, {_NUMBERS}) -> ({', '.join(['Tensor'] * (len(NAMES) + 1))})",
    check=_check,
    backward_check=_backward_check,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)


def fuses_projection(x: Tensor, weight: Tensor, layout: TriplaneLayout, plane: str) -> bool:
    """Whether `triplane_project` should take the projection of x (B, T H W, C) by layers of matrices like `weight`.

    So it should where a kernel serves it, and where that is the quicker way. On a CPU with a gradient in bfloat16 and
    more than 128 channels it is not. On a GPU it is wherever Triton's kernels take the arguments, with a gradient too:
    full size, computed, 6 launches and 0.95 GB in place of 121 and 2.8. Where there is no Triton, and where CUDA C++
    was asked for, it is with gradients disabled. Nor is it used under torch.compile, which fuses by itself, nor where
    PyTorch must see every operation.
    """
    if torch.compiler.is_compiling() or transforming() or x.is_meta:
        return False
    device, asked = x.device.type, choice.requested()
    if choice.serves("cpu", OP, asked, device, x.dtype):
        dtype = autocast_dtype(device) or weight.dtype
        return not (dtype == torch.bfloat16 and x.shape[-1] > MOST_CHANNELS_IN_BFLOAT16 and records(x, weight))
    for backend in ("triton", "cuda"):
        if choice.serves(backend, OP, asked, device, x.dtype):
            alone = (x, plane, layout.time, layout.height, layout.width, 1, 0.0)
            fits = choice.refusal(backend, OP, alone) is None
            return fits and not (torch.is_grad_enabled() and _lacks_gradient(backend))
    return False


def _lacks_gradient(backend: str) -> bool:
    return not hasattr(choice.implementation(backend, OP), "backward")


def _expect_gradient(backend: str, x: Tensor) -> None:
    """Raise BackendError, before anything is computed, if the backward pass would. A backend that can't run here isn't
    looked at: forward says why."""
    if choice.why_not(backend, OP, x) is None and _lacks_gradient(backend):
        reason = choice.implementation(backend, OP).NO_GRADIENT
        raise BackendError(f"Backend {backend!r} was asked for, but cannot serve {OP}: {reason}")


def _stacked(layers: Sequence[ProjectionLayer]) -> dict[str, Tensor]:
    """The parameters of all layers by name, (layers, ...): views of one copy for each dtype, which is one launch."""
    kinds = {name: [getattr(layer, name) for layer in layers] for name in ProjectionLayer._fields}
    stacked: dict[str, Tensor] = {}
    for dtype in {kind[0].dtype for kind in kinds.values()}:
        of_dtype = {name: kind for name, kind in kinds.items() if kind[0].dtype == dtype}
        copy = torch.cat([tensor.flatten() for kind in of_dtype.values() for tensor in kind])
        parts = copy.split([sum(tensor.numel() for tensor in kind) for kind in of_dtype.values()])
        shapes = ((len(kind), *kind[0].shape) for kind in of_dtype.values())
        stacked |= {name: part.view(shape) for name, part, shape in zip(of_dtype, parts, shapes, strict=True)}
    return stacked


def triplane_project(
    x: Tensor,
    layout: TriplaneLayout,
    plane: str,
    token: Tensor,
    positions: Tensor,
    layers: Sequence[ProjectionLayer],
    latent_weight: Tensor,
    latent_bias: Tensor,
    *,
    heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """The latents of one plane (PVDM, section 3.1).

    That is `triplane_slice`, pre-norm transformer layers over each sequence, of which element 0 is kept, a linear layer
    (the release's 1 x 1 convolution), and tanh.

    Args:
        x: (B, T H W, C) lattice tokens in the order (t, h, w). Differentiable, as are all tensors.
        plane: "xy" (sequences along time, one for each h, w), "yt" (along height), "xt" (along width).
        token: (C), positions: (L + 1, C): of `triplane_slice`; L is the length of the collapsed axis.
        layers: at least one. Their matrices and latent_weight share a dtype (autocast casts them and the biases).
        latent_weight: (D, C), latent_bias: (D).
        heads: divides the attention's inner width.

    Returns:
        (B, sites, D), contiguous, in the dtype of the matrices; sites in the order of the plane's packed tokens.

    Raises:
        ValueError: shapes or dtypes that don't fit, an unknown plane, no layer.
        BackendError: the backend asked for can't serve, such as "cuda" with a gradient.

    Precision: sums and the residual stream are in float32 at least. Matrices in bfloat16 are multiplied with rows that
        are rounded to bfloat16 where the CPU multiplies it, and on a GPU.
    Derivatives: reverse mode once by a kernel, which keeps nothing but the inputs and computes the layers again. While
        it runs, Triton's needs memory for the weights' gradients, at most 512 MiB (full size in bfloat16: 393 MB a
        clip). Forward mode (jvp), double backward, Hessian-vector products and `torch.func` are right on every backend,
        through the reference, which a log line says once. `vmap` runs the operation for each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, cpu, triton (at most 63 tokens along the axis; not on AMD's GPUs), cuda (at most 63 tokens,
        channels in multiples of 8, no gradient; by itself only where there is no Triton).
    """
    if not layers:
        raise ValueError(f"{OP}: there must be at least one layer.")
    tensors = {
        "token": token,
        "positions": positions,
        **_stacked(layers),
        "latent_weight": latent_weight,
        "latent_bias": latent_bias,
    }
    tensors |= dict(zip(CAST, autocast(*(tensors[name] for name in CAST)), strict=True))
    where = (plane, layout.time, layout.height, layout.width, heads, eps)
    asked = choice.requested()
    # Not in transforms: forward mode takes the reference whoever was asked for.
    if not (asked == "auto" or torch.compiler.is_compiling() or transforming()) and records(x, *tensors.values()):
        _expect_gradient(asked, x)
    return _forwards(x, *(tensors[name] for name in NAMES), *where, asked)

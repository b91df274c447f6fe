"""Attention of a lattice of tokens along time or inside frames, including the table rotation of q and k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pvdm_fast.backends import choice
from pvdm_fast.ops import costs
from pvdm_fast.ops.derivatives import by_reference, records, split_dual, tangent_of
from pvdm_fast.ops.registry import (
    autocast,
    default_scale,
    expect_dtype,
    expect_real,
    expect_shapes,
    reference,
    register,
    register_by_reference,
    statistic,
)


def _check(qkv: Tensor, query: Tensor | None, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float) -> None:
    expect_real("axial_attention", qkv, query, sin, cos)
    parts = 3 if query is None else 2
    if qkv.dim() != 7 or qkv.shape[4] != parts or qkv.numel() == 0:
        raise ValueError(
            f"axial_attention: qkv must be (B, T, H, W, {parts}, heads, d) and not empty, not {tuple(qkv.shape)}."
        )
    if axis not in ("time", "space"):
        raise ValueError(f"axial_attention: axis must be 'time' or 'space', not {axis!r}.")
    batch, time, height, width, _, heads, head_width = qkv.shape
    if query is not None:
        shape = (batch, 1, height, width, heads, head_width)
        if axis != "time" or sin is not None or cos is not None or query.shape != shape or query.dtype != qkv.dtype:
            raise ValueError(
                "axial_attention: query must be (B, 1, H, W, heads, d), in the dtype of qkv, along time and without "
                f"rotation; got shape {tuple(query.shape)}, {query.dtype}, axis {axis!r}."
            )
    if (sin is None) != (cos is None):
        raise ValueError("axial_attention: rotation tables come in pairs, sin and cos.")
    if qkv.dtype != torch.float64:
        expect_dtype("axial_attention", torch.float32, sin=sin, cos=cos)
    length = time if axis == "time" else height * width
    for table in (sin, cos):
        if table is not None and (table.shape != (length, head_width) or head_width % 2):
            raise ValueError(
                f"axial_attention: rotation tables must be ({length}, {head_width}), and the width of a head even."
            )


def _backward_check(
    grad: Tensor,
    qkv: Tensor,
    query: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    out: Tensor,
    lse: Tensor,
    axis: str,
    scale: float,
) -> None:
    _check(qkv, query, sin, cos, axis, scale)
    expect_real("axial_attention", qkv, grad, out, lse)
    expect_dtype("axial_attention", qkv.dtype, grad=grad, out=out)
    expect_dtype("axial_attention", statistic(qkv.dtype), lse=lse)
    shape, logs = _shapes(qkv, query, axis)
    expect_shapes("axial_attention", grad=(grad, shape), out=(out, shape), lse=(lse, logs))


def _jvp_check(qkv: Tensor, tangent: Tensor, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float) -> None:
    _check(qkv, None, sin, cos, axis, scale)
    expect_real("axial_attention", qkv, tangent)
    expect_dtype("axial_attention", qkv.dtype, tangent=tangent)
    expect_shapes("axial_attention", tangent=(tangent, tuple(qkv.shape)))


def _shapes(qkv: Tensor, query: Tensor | None, axis: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the result and of the log-sum-exp."""
    batch, time, height, width, _, heads, head_width = qkv.shape
    if query is not None:
        time = 1
    sites, queries = (height * width, time) if axis == "time" else (time, height * width)
    return (batch, time, height, width, heads, head_width), (batch, sites, heads, queries)


def _fake(
    qkv: Tensor, query: Tensor | None, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float
) -> tuple[Tensor, Tensor]:
    shape, logs = _shapes(qkv, query, axis)
    return qkv.new_empty(shape), qkv.new_empty(logs, dtype=statistic(qkv.dtype))


def _backward_fake(grad: Tensor, qkv: Tensor, query: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    dquery = qkv.new_empty(0) if query is None else torch.empty_like(query, memory_format=torch.contiguous_format)
    return torch.empty_like(qkv), dquery


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, query, sin, cos, ctx.axis, ctx.scale, ctx.backend = inputs
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        raise ValueError("axial_attention: rotation tables have no gradient: pass sin.detach() and cos.detach().")
    ctx.save_for_backward(qkv, query, sin, cos, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    dqkv, dquery = _backwards(grad, *ctx.saved_tensors, ctx.axis, ctx.scale, ctx.backend)
    return dqkv, dquery if ctx.needs_input_grad[1] else None, None, None, None, None, None


def _jvp_fake(
    qkv: Tensor, tangent: Tensor, sin: Tensor | None, cos: Tensor | None, axis: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _fake(qkv, None, sin, cos, axis, scale)
    return out, lse, torch.empty_like(out)


def _forward_mode(
    qkv: Tensor,
    query: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    axis: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tables = any(table is not None and tangent_of(table) is not None for table in (sin, cos))
    if query is not None or tables or records(qkv):
        run = by_reference("axial_attention", "its forward-mode derivative", _compute)
        return run(qkv, query, sin, cos, axis, scale, backend)
    primal, tangent = split_dual(qkv)
    out, lse, dout = _jvp(primal, tangent, sin, cos, axis, scale, backend)
    return forward_ad.make_dual(out, dout, level=0), lse


def _compute(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    return reference("axial_attention").forward(*inputs)


def _flops(direction: str, *inputs: Any) -> int:
    qkv, axis = inputs[direction == "backward"], inputs[-2]
    batch, time, height, width, _, heads, size = qkv.shape
    sequences, length = (height * width, time) if axis == "time" else (time, height * width)
    queries = length if qkv.shape[4] == 3 else 1
    return costs.attention_passes(direction, costs.attention(batch * sequences, queries, length, heads * size))


_forwards, _backwards = register(
    "axial_attention",
    schema="(Tensor qkv, Tensor? query, Tensor? sin, Tensor? cos, str axis, float scale, str backend)"
    " -> (Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor qkv, Tensor? query, Tensor? sin, Tensor? cos, Tensor out, Tensor lse,"
    " str axis, float scale, str backend) -> (Tensor, Tensor)",
    check=_check,
    backward_check=_backward_check,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
    forward_mode=_forward_mode,
)
_jvp = register_by_reference(
    "axial_attention",
    "axial_attention_jvp",
    "jvp",
    schema="(Tensor qkv, Tensor tangent, Tensor? sin, Tensor? cos, str axis, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    check=_jvp_check,
    fake=_jvp_fake,
    flops=_flops,
)


def axial_attention(
    qkv: Tensor,
    axis: str,
    rotation: tuple[Tensor, Tensor] | None = None,
    query: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention along one axis of a lattice (the TimeSformer layers and the projections of PVDM).

    Args:
        qkv: (B, T, H, W, 3, heads, d), any strides. With `query` it holds only keys and values: (B, T, H, W, 2, heads,
            d). Differentiable.
        axis: with "time", a sequence is the T tokens of one site. With "space", it is the H W tokens of one frame.
        rotation: (sin, cos) tables, each (sequence length, d), used in float32 (for float64 qkv in their own dtype). q
            and k become x cos + R(x) sin, where R takes each neighbouring pair (a, b) to (-b, a). Tables get no
            gradient, but may carry a tangent.
        query: (B, 1, H, W, heads, d): one query per sequence along time, instead of T. Differentiable.
        scale: factor of the scores. None means d ** -0.5.

    Returns:
        (B, T, H, W, heads, d), or (B, 1, H, W, heads, d) with `query`; contiguous.

    Raises:
        ValueError: shapes don't fit, the axis is unknown, `query` comes with a rotation or along space, or tables
            require a gradient.

    Derivatives: reverse mode once by the backend's kernel. Forward mode (jvp), double backward, Hessian-vector products
        and `torch.func` work on every backend, computed by the reference. A log line says so once. If only qkv carries
        a tangent, `cpu` has its own jvp kernel with O(N) memory. `vmap` runs the operation for each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, cpu, triton, cuda.
    """
    sin, cos = rotation if rotation is not None else (None, None)
    (qkv,) = autocast(qkv)
    query = query if query is None else query.to(qkv.dtype)
    if sin is not None and cos is not None and qkv.dtype != torch.float64:
        sin, cos = sin.float(), cos.float()
    scale = default_scale(qkv) if scale is None else scale
    return _forwards(qkv, query, sin, cos, axis, scale, choice.requested())[0]

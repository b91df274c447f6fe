"""The wide steps of a transformer layer, in pieces, saving only the pre-norm stream for the backward pass.

A feed-forward's hidden layer is up to 8 times as wide as the stream, an attention's queries, keys and values 4 times.
Both are computed piece by piece, and recomputed in the backward pass together with their norm. On a CPU a piece stays
in the cache and reuses mapped memory, while a whole layer's new pages fault one by one. That pays for the
recomputation. Measured with 16,384 tokens of 384 channels, float32, both passes, CPU time of an AMD Zen 5 core, default
malloc (in parentheses: in one piece, with everything saved): feed-forward 1.22 s (1.44), time attention 0.64 (0.64),
space attention 1.16 (1.18), a projection's two layers 1.59 (1.47).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvdm_fast import ops
from pvdm_fast.backends import choice
from pvdm_fast.nn.linear import Linear, linear, product, weight_gradient
from pvdm_fast.nn.plain import weight_of, weights_of
from pvdm_fast.ops.derivatives import transforming, without_autocast
from pvdm_fast.ops.registry import OPERATION, autocast, statistic

# Bytes of the widest tensor of a piece. A step with a single piece isn't recomputed, because there is little to save.
PIECE_ON_CPU = 12 << 20
PIECE = 64 << 20  # elsewhere a piece must fill the device


class Normed(NamedTuple):
    """A LayerNorm over the last axis, and what it is computed from. `values` aren't saved, `again` recomputes them."""

    values: Tensor
    total: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


def values_of(x: Normed | Tensor) -> Tensor:
    """What is normed."""
    return x.values if isinstance(x, Normed) else x


def _again(total: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
    return OPERATION["add_layer_norm"](total, None, weight, bias, eps, backend)[1]


def _pieces(length: int, bytes_each: int, device: torch.device) -> int:
    """How many of `length` rows make a piece, if each has so many bytes at its widest."""
    return min(length, max(1, (PIECE_ON_CPU if device.type == "cpu" else PIECE) // bytes_each))


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of sums over pieces."""
    return torch.promote_types(x.dtype, torch.float32)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part.to(_wide(part)) if total is None else total.add_(part)


def _like(total: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if total is None else total.to(parameter.dtype)


def _feed_forward(
    values: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    activation: str,
    backend: str,
) -> Tensor:
    """The step in one piece, in operations that autograd records."""
    hidden = linear(values.to(first.dtype), first, first_bias)
    return linear(ACTIVATIONS[activation][0](hidden, backend), second, second_bias)


def _differentiable(
    out: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> Iterator[Tensor | None]:
    """The needed gradients of `inputs`, as functions of everything that `out` was computed from."""
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
    with without_autocast(grad.device.type):
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return (next(found) if needed else None for needed in needs)


def _in_one_piece(x: Tensor) -> bool:
    """Whether not to cut: compiled code fuses by itself, transforms must see every operation, and tensors without
    memory don't need it."""
    return torch.compiler.is_compiling() or transforming() or x.is_meta


class _FeedForward(torch.autograd.Function):
    """activation(normed @ first.T + bias) @ second.T + bias, by pieces of rows."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, total: Tensor, scale: Tensor, shift: Tensor,
        first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor,
        eps: float, activation: str, rows: int,
    ) -> Tensor:  # fmt: skip
        ctx.eps, ctx.activation, ctx.rows, ctx.backend = eps, activation, rows, choice.requested()
        ctx.save_for_backward(total, scale, shift, first, first_bias, second, second_bias)
        activate = ACTIVATIONS[activation][0]
        flat = values.flatten(0, -2)
        out = flat.new_empty(len(flat), len(second), dtype=second.dtype)
        for start in range(0, len(flat), rows):
            hidden = product(flat[start : start + rows].to(first.dtype), first, first_bias)
            out[start : start + rows] = product(activate(hidden, ctx.backend), second, second_bias)
        return out.unflatten(0, values.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        total, scale, shift, first, first_bias, second, second_bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            normed = _again(total, scale, shift, ctx.eps, ctx.backend)
            weights = first, first_bias, second, second_bias
            out = _feed_forward(normed, *weights, ctx.activation, ctx.backend)
            dvalues, *dweights = _differentiable(
                out, (normed, *weights), ctx.needs_input_grad[:1] + ctx.needs_input_grad[4:8], grad
            )
            return dvalues, None, None, None, *dweights, None, None, None
        forward, backward = ACTIVATIONS[ctx.activation]
        stream, grad_rows = total.flatten(0, -2), grad.flatten(0, -2)
        dvalues = torch.empty_like(stream, memory_format=torch.contiguous_format)
        dfirst = dfirst_bias = dsecond = dsecond_bias = None
        with without_autocast(grad.device.type):
            for start in range(0, len(stream), ctx.rows):
                piece = slice(start, start + ctx.rows)
                normed = _again(stream[piece], scale, shift, ctx.eps, ctx.backend).to(first.dtype)
                hidden = product(normed, first, first_bias)
                part = grad_rows[piece].contiguous()
                if ctx.needs_input_grad[6]:
                    dsecond = _added(dsecond, weight_gradient(part, forward(hidden, ctx.backend)))
                if ctx.needs_input_grad[7]:
                    dsecond_bias = _added(dsecond_bias, part.sum(0, dtype=_wide(part)))
                dhidden = backward(product(part, second.t()), hidden, ctx.backend)
                if ctx.needs_input_grad[4]:
                    dfirst = _added(dfirst, weight_gradient(dhidden, normed))
                if ctx.needs_input_grad[5]:
                    dfirst_bias = _added(dfirst_bias, dhidden.sum(0, dtype=_wide(part)))
                dvalues[piece] = product(dhidden, first.t())
        parameters = (_like(dfirst, first), _like(dfirst_bias, first), _like(dsecond, second))
        return dvalues.view(total.shape), None, None, None, *parameters, _like(dsecond_bias, second), None, None, None


ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "geglu": (OPERATION["geglu"], OPERATION["geglu_backward"]),
    "gelu": (lambda x, _: F.gelu(x), lambda grad, x, _: torch.ops.aten.gelu_backward(grad, x)),
}


def feed_forward(x: Normed | Tensor, first: nn.Module, second: nn.Module, activation: str) -> Tensor:
    """second(activation(first(x))).

    Args:
        x: (..., C). first: C -> M. second: M -> C', or M / 2 -> C' with activation "geglu"; else "gelu".

    Returns:
        (..., C'). If x is Normed, both layers are plain, and there are several pieces, only x.total is saved for the
        backward pass.
    """
    into, out_of = weights_of(first, Linear), weights_of(second, Linear)
    if isinstance(x, Normed) and into is not None and out_of is not None and not _in_one_piece(x.values):
        weights = autocast(*into, *out_of)
        tokens = x.values.numel() // x.values.shape[-1]
        rows = _pieces(tokens, len(weights[0]) * weights[0].element_size(), x.values.device)
        if rows < tokens:
            with without_autocast(x.values.device.type):
                out: Tensor = _FeedForward.apply(*x[:4], *weights, x.eps, activation, rows)
            return out
    hidden = first(values_of(x)) if into is None else linear(values_of(x), *into)
    hidden = ops.geglu(hidden) if activation == "geglu" else F.gelu(hidden)
    return second(hidden) if out_of is None else linear(hidden, *out_of)


class Sequences(NamedTuple):
    """Tokens as (groups, time, sites, C). They attend along time at each site, or along sites (then time is 1)."""

    groups: int
    time: int
    sites: int
    axis: str

    def cut(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Pieces of about `rows` tokens as (axis, start, length): of groups, or of the sites of all."""
        axis, whole = (2, self.sites) if self.axis == "time" and self.sites > 1 else (0, self.groups)
        each = max(1, rows * whole // (self.groups * self.time * self.sites))
        for start in range(0, whole, each):
            yield axis, start, min(each, whole - start)


class _Attention(torch.autograd.Function):
    """Attention of queries, keys and values that are a linear layer of the norm, by pieces of sequences."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, total: Tensor, scale: Tensor, shift: Tensor, weight: Tensor,
        sin: Tensor | None, cos: Tensor | None, eps: float, heads: int, sequences: Sequences, rows: int,
    ) -> Tensor:  # fmt: skip
        ctx.eps, ctx.heads, ctx.sequences, ctx.rows, ctx.backend = eps, heads, sequences, rows, choice.requested()
        groups, time, sites, axis = sequences
        tokens = values.reshape(groups, time, sites, -1)
        out = tokens.new_empty(groups, time, sites, len(weight) // 3, dtype=weight.dtype)
        lse_shape = (groups, sites, heads, time) if axis == "time" else (groups, 1, heads, sites)
        lse = tokens.new_empty(lse_shape, dtype=statistic(weight.dtype))
        for cut in sequences.cut(rows):
            qkv = _qkv(tokens.narrow(*cut), weight, heads)
            part, part_lse = OPERATION["axial_attention"](qkv, None, sin, cos, axis, qkv.shape[-1] ** -0.5, ctx.backend)
            out.narrow(*cut).copy_(part.flatten(3))
            lse.narrow(cut[0] // 2, *cut[1:]).copy_(part_lse)  # sites are its axis 1
        ctx.save_for_backward(total, scale, shift, weight, sin, cos, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        total, scale, shift, weight, sin, cos, out, lse = ctx.saved_tensors
        groups, time, sites, axis = ctx.sequences
        if torch.is_grad_enabled():
            normed = _again(total, scale, shift, ctx.eps, ctx.backend)
            qkv = linear(normed.to(weight.dtype), weight).view(groups, time, sites, 1, 3, ctx.heads, -1)
            again = OPERATION["axial_attention"](qkv, None, sin, cos, axis, qkv.shape[-1] ** -0.5, ctx.backend)[0]
            needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
            dvalues, dweight = _differentiable(again.flatten(3), (normed, weight), needs, grad)
            return dvalues, None, None, None, dweight, *[None] * 6
        stream = total.reshape(groups, time, sites, -1)
        dvalues = torch.empty_like(stream, memory_format=torch.contiguous_format)
        dweight = None

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (ctx.heads, -1)).unsqueeze(3)

        with without_autocast(grad.device.type):
            for cut in ctx.sequences.cut(ctx.rows):
                normed = _again(stream.narrow(*cut), scale, shift, ctx.eps, ctx.backend).to(weight.dtype)
                qkv = _qkv(normed, weight, ctx.heads)
                dqkv, _ = OPERATION["axial_attention_backward"](
                    by_head(grad.narrow(*cut)), qkv, None, sin, cos, by_head(out.narrow(*cut)),
                    lse.narrow(cut[0] // 2, *cut[1:]), axis, qkv.shape[-1] ** -0.5, ctx.backend,
                )  # fmt: skip
                rows = dqkv.view(-1, len(weight))
                if ctx.needs_input_grad[4]:
                    dweight = _added(dweight, weight_gradient(rows, normed.flatten(0, 2)))
                dvalues.narrow(*cut).copy_(product(rows, weight.t()).view(normed.shape))
        return dvalues.view(total.shape), None, None, None, _like(dweight, weight), *[None] * 6


def _qkv(tokens: Tensor, weight: Tensor, heads: int) -> Tensor:
    """tokens: (g, t, p, C) -> (g, t, p, 1, 3, heads, d)."""
    rows = tokens.reshape(-1, tokens.shape[-1]).to(weight.dtype)
    return product(rows, weight).view(*tokens.shape[:3], 1, 3, heads, -1)


def attention(
    x: Normed | Tensor,
    to_qkv: nn.Module,
    heads: int,
    sequences: Sequences,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`ops.axial_attention` of to_qkv(x).

    Args:
        x: the tokens of `sequences` in their order, each with C channels. to_qkv: C -> 3 heads d, without a bias.
        rotation: the tables of `ops.axial_attention`.

    Returns:
        (groups, time, sites, heads d). If x is Normed, the layer is plain, and there are several pieces, only the
        result, x.total and one number per query and head are saved for the backward pass.
    """
    groups, time, sites, axis = sequences
    plain = weight_of(to_qkv, Linear)
    if isinstance(x, Normed) and plain is not None and not _in_one_piece(x.values):
        (weight,) = autocast(plain)
        tokens = groups * time * sites
        rows = _pieces(tokens, len(weight) * weight.element_size(), weight.device)
        if rows < tokens:
            sin, cos = rotation or (None, None)
            with without_autocast(weight.device.type):
                out: Tensor = _Attention.apply(*x[:4], weight, sin, cos, x.eps, heads, sequences, rows)
            return out
    qkv = to_qkv(values_of(x)) if plain is None else linear(values_of(x), plain)
    qkv = qkv.view(groups, time, sites, 1, 3, heads, -1)
    return ops.axial_attention(qkv, axis, rotation).flatten(3)

"""The projection to one plane by its parts: slice, pre-norm transformer layers of which element 0 is kept, tanh."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.reference import add_layer_norm, axial_attention, triplane_slice, wide


class _Layer(NamedTuple):
    """A layer's parameters."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


class _Step(NamedTuple):
    """What a layer computed: both norms (the normed sum, result, mean, 1 / std), attention, the hidden layer."""

    norm1: tuple[Tensor, ...]
    attended: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, ...]
    hidden: Tensor


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    _, normed, mean, rstd = add_layer_norm.forward(x, None, weight, bias, eps)
    return x, normed, mean, rstd


def _parts(normed: Tensor, qkv_weight: Tensor, heads: int, first: bool) -> tuple[Tensor, Tensor | None]:
    """normed: (S, L, C) -> queries, keys and values (S, L, 1, 1, 3, heads, d); with `first` keys and values, and
    element 0's query (S, 1, 1, 1, heads, d)."""
    if not first:
        return F.linear(normed, qkv_weight).unflatten(-1, (3, heads, -1))[:, :, None, None], None
    inner = len(qkv_weight) // 3
    kv = F.linear(normed, qkv_weight[inner:]).unflatten(-1, (2, heads, -1))[:, :, None, None]
    return kv, F.linear(normed[:, :1], qkv_weight[:inner]).unflatten(-1, (heads, -1))[:, :, None, None]


def _run(x: Tensor, layers: list[_Layer], heads: int, eps: float) -> tuple[Tensor, list[_Step]]:
    """x: (S, L, C) -> element 0 of the last layer (S, C), and what every layer computed."""
    steps = []
    for index, p in enumerate(layers):
        last = index == len(layers) - 1
        norm1 = _norm(x, p.norm1_weight, p.norm1_bias, eps)
        qkv, query = _parts(norm1[1], p.qkv_weight, heads, last)
        attended = axial_attention.forward(qkv, query, None, None, "time", qkv.shape[-1] ** -0.5)
        x = (x[:, :1] if last else x) + F.linear(attended[0].flatten(2), p.out_weight, p.out_bias)
        norm2 = _norm(x, p.norm2_weight, p.norm2_bias, eps)
        hidden = F.linear(norm2[1], p.up_weight, p.up_bias)
        x = x + F.linear(F.gelu(hidden), p.down_weight, p.down_bias)
        steps.append(_Step(norm1, attended, norm2, hidden))
    return x[:, 0], steps


def forward(
    x: Tensor, token: Tensor, positions: Tensor,
    norm1_weight: Tensor, norm1_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    norm2_weight: Tensor, norm2_bias: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor,
    down_bias: Tensor, latent_weight: Tensor, latent_bias: Tensor,
    plane: str, time: int, height: int, width: int, heads: int, eps: float,
) -> Tensor:  # fmt: skip
    """x: (B, T H W, C) -> (B, sites, D) in the dtype of the matrices."""
    parameters = (norm1_weight, norm1_bias, qkv_weight, out_weight, out_bias, norm2_weight, norm2_bias)
    stacked = wide(x, *parameters, up_weight, up_bias, down_weight, down_bias)[1:]
    layers = [_Layer(*one) for one in zip(*(t.unbind() for t in stacked), strict=True)]
    x_, token_, positions_, weight, bias = wide(x, token, positions, latent_weight, latent_bias)
    sequences = triplane_slice.forward(x_, token_, positions_, plane, time, height, width)
    kept, _ = _run(sequences.flatten(0, 1), layers, heads, eps)
    return F.linear(kept, weight, bias).tanh().unflatten(0, sequences.shape[:2]).to(qkv_weight.dtype).contiguous()


def _sum(x: Tensor) -> Tensor:
    return x.flatten(0, -2).sum(0)


def _weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a linear layer's weight."""
    return grad.flatten(0, -2).mT @ x.flatten(0, -2)


def _gelu_slope(x: Tensor) -> Tensor:
    density = (-0.5 * x * x).exp() * 0.3989422804014327
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * density


def _layer_backward(grad: Tensor, p: _Layer, step: _Step, heads: int, last: bool) -> tuple[Tensor, _Layer]:
    """The gradient of a layer's input from `grad`, that of its result, and its parameters'."""
    hidden, gelu = step.hidden, F.gelu(step.hidden)
    dhidden = grad @ p.down_weight * _gelu_slope(hidden)
    total, normed, mean, rstd = step.norm2
    dtotal, *dnorm2 = add_layer_norm.backward(dhidden @ p.up_weight, grad, total, p.norm2_weight, mean, rstd)
    ffn = (_weight(dhidden, normed), _sum(dhidden), _weight(grad, gelu), _sum(grad))
    attended, lse = step.attended
    dattended = (dtotal @ p.out_weight).view(attended.shape)
    out = (_weight(dtotal, attended.flatten(2)), _sum(dtotal))
    total, normed, mean, rstd = step.norm1
    qkv, query = _parts(normed, p.qkv_weight, heads, last)
    inner = len(p.qkv_weight) // 3
    dqkv, dquery = axial_attention.backward(
        dattended, qkv, query, None, None, attended, lse, "time", qkv.shape[-1] ** -0.5
    )
    dqkv = dqkv.flatten(2)
    if last:
        dquery = dquery.flatten(2)
        dnormed = dqkv @ p.qkv_weight[inner:]
        rest = dnormed.new_zeros(dnormed.shape[0], dnormed.shape[1] - 1, dnormed.shape[2])
        dnormed = dnormed + torch.cat((dquery @ p.qkv_weight[:inner], rest), dim=1)
        dtotal = torch.cat((dtotal, rest), dim=1)
        dweight = torch.cat((_weight(dquery, normed[:, :1]), _weight(dqkv, normed)))
    else:
        dnormed, dweight = dqkv @ p.qkv_weight, _weight(dqkv, normed)
    dx, *dnorm1 = add_layer_norm.backward(dnormed, dtotal, total, p.norm1_weight, mean, rstd)
    return dx, _Layer._make((*dnorm1, dweight, *out, *dnorm2, *ffn))


def backward(
    grad: Tensor, x: Tensor, token: Tensor, positions: Tensor,
    norm1_weight: Tensor, norm1_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    norm2_weight: Tensor, norm2_bias: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor,
    down_bias: Tensor, latent_weight: Tensor, latent_bias: Tensor,
    plane: str, time: int, height: int, width: int, heads: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x and of all parameters from grad: (B, sites, D)."""
    first = (norm1_weight, norm1_bias, qkv_weight, out_weight, out_bias, norm2_weight, norm2_bias)
    parameters = (*first, up_weight, up_bias, down_weight, down_bias)
    stacked = wide(x, *parameters)[1:]
    layers = [_Layer(*one) for one in zip(*(t.unbind() for t in stacked), strict=True)]
    x_, token_, positions_, weight, bias = wide(x, token, positions, latent_weight, latent_bias)
    where = (plane, time, height, width)
    sequences = triplane_slice.forward(x_, token_, positions_, *where)
    kept, steps = _run(sequences.flatten(0, 1), layers, heads, eps)
    latent = F.linear(kept, weight, bias).tanh()
    dlatent = grad.to(latent.dtype).flatten(0, 1) * (1 - latent * latent)
    flowing = (dlatent @ weight)[:, None]
    gradients: list[_Layer] = []
    for index in reversed(range(len(layers))):
        flowing, of_layer = _layer_backward(flowing, layers[index], steps[index], heads, index == len(layers) - 1)
        gradients.insert(0, of_layer)
    dx, dtoken, dpositions = triplane_slice.backward(flowing.view(sequences.shape), token_, positions_, *where)
    found = [
        torch.stack(kind).to(like.dtype) for kind, like in zip(zip(*gradients, strict=True), parameters, strict=True)
    ]
    ends = (_weight(dlatent, kept).to(latent_weight.dtype), _sum(dlatent).to(latent_bias.dtype))
    return dx.to(x.dtype), dtoken.to(token.dtype), dpositions.to(positions.dtype), *found, *ends

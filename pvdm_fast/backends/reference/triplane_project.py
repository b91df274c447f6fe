"""The projection to one plane by its parts: slice, pre-norm transformer layers of which element 0 is kept, tanh."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.projection_layers import NAMES, ProjectionLayer
from pvdm_fast.backends.reference import add_layer_norm, axial_attention, triplane_slice, wide
from pvdm_fast.backends.reference.geglu import gelu_slope


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


def _run(x: Tensor, layers: list[ProjectionLayer], heads: int, eps: float) -> tuple[Tensor, list[_Step]]:
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


def _unpack(x: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """x, token, positions, the layers, the last weight and bias, all wide; and the numbers behind the tensors."""
    x, token, positions, *stacked, weight, bias = wide(x, *arguments[: len(NAMES)])
    layers = [ProjectionLayer(*one) for one in zip(*(t.unbind() for t in stacked), strict=True)]
    return x, token, positions, layers, weight, bias, arguments[len(NAMES) :]


def forward(x: Tensor, *arguments: Any) -> Tensor:
    """x: (B, T H W, C), then the tensors of NAMES, plane, time, height, width, heads, eps -> (B, sites, D) in the
    dtype of the matrices."""
    x, token, positions, layers, weight, bias, (*where, heads, eps) = _unpack(x, arguments)
    sequences = triplane_slice.forward(x, token, positions, *where)
    kept, _ = _run(sequences.flatten(0, 1), layers, heads, eps)
    latents = F.linear(kept, weight, bias).tanh().unflatten(0, sequences.shape[:2])
    return latents.to(arguments[NAMES.index("qkv_weight")].dtype).contiguous()


def _sum(x: Tensor) -> Tensor:
    return x.flatten(0, -2).sum(0)


def _weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a linear layer's weight."""
    return grad.flatten(0, -2).mT @ x.flatten(0, -2)


def _layer_backward(
    grad: Tensor, p: ProjectionLayer, step: _Step, heads: int, last: bool
) -> tuple[Tensor, ProjectionLayer]:
    """The gradient of a layer's input from `grad`, that of its result, and its parameters'."""
    hidden, gelu = step.hidden, F.gelu(step.hidden)
    dhidden = grad @ p.down_weight * gelu_slope(hidden)[1]
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
    return dx, ProjectionLayer._make((*dnorm1, dweight, *out, *dnorm2, *ffn))


def backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x and of all tensors of NAMES from grad: (B, sites, D)."""
    originals = (x, *arguments[: len(NAMES)])
    x, token, positions, layers, weight, bias, (*where, heads, eps) = _unpack(x, arguments)
    sequences = triplane_slice.forward(x, token, positions, *where)
    kept, steps = _run(sequences.flatten(0, 1), layers, heads, eps)
    latent = F.linear(kept, weight, bias).tanh()
    dlatent = grad.to(latent.dtype).flatten(0, 1) * (1 - latent * latent)
    flowing = (dlatent @ weight)[:, None]
    gradients: list[ProjectionLayer] = []
    for index in reversed(range(len(layers))):
        flowing, of_layer = _layer_backward(flowing, layers[index], steps[index], heads, index == len(layers) - 1)
        gradients.insert(0, of_layer)
    of_slice = triplane_slice.backward(flowing.view(sequences.shape), token, positions, *where)
    of_layers = (torch.stack(kind) for kind in zip(*gradients, strict=True))
    found = (*of_slice, *of_layers, _weight(dlatent, kept), _sum(dlatent))
    return tuple(gradient.to(like.dtype) for gradient, like in zip(found, originals, strict=True))

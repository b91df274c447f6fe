"""Every operation in plain PyTorch: the formula, its gradient, and the oracle of every test.

`forward` and `backward` of a module take the arguments of the registered operation of the same name. Statistics and
sums are in float32 at least (float64 for float64 inputs); results come back in the dtype of the first argument.

All of it is out of place and in operations that PyTorch differentiates, forwards and backwards, to any order, and maps
over: derivatives that no kernel computes are taken of these functions. `backward` reads what the forward pass saved;
`backward_of_inputs`, where a module has it, takes the same arguments, but makes that from the inputs again, so that the
derivatives of what was saved are part of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that the first is computed in: float64 stays, everything else becomes float32."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def softmax(scores: Tensor) -> Tensor:
    """Over the last axis. PyTorch's own has a tangent whose backward pass raises (2.14: it is changed in place)."""
    if forward_ad._current_level < 0:
        return scores.softmax(-1)
    exponentials = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def in_order_of(x: Tensor, like: Tensor) -> Tensor:
    """`x` with its memory in the order of `like`, whose shape it has: what `torch.empty_like(like)` would have."""
    order = sorted(range(like.dim()), key=lambda axis: like.stride(axis), reverse=True)
    wanted = torch.empty_like(like, device="meta").stride()
    if x.stride() == wanted:
        return x
    back = sorted(range(like.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def rstd_of(variance: Tensor, rstd: Tensor) -> Tensor:
    """`rstd` = 1 / sqrt(variance + eps) as it was computed, as a function of `variance`, for any derivative of it.

    eps is not needed: what rstd was made of is 1 / rstd^2, and moves as the variance does.
    """
    rstd = rstd.detach().to(variance.dtype)
    return (variance - variance.detach() + rstd.square().reciprocal()).rsqrt()

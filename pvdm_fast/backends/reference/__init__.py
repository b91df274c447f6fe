"""Every operation in plain PyTorch: the formula, its gradient, and what every test compares with.

`forward` and `backward` of a module take the arguments of the registered operation of the same name. Statistics and
sums are at least float32 (float64 for float64 inputs). Results have the dtype of the first argument.

Everything is out of place, and made of operations that PyTorch differentiates to any order, forwards and backwards, and
maps over with vmap. So derivatives that no kernel computes are taken of these functions.

`backward` reads what the forward pass saved. `backward_of_inputs`, where a module has it, takes the same arguments, but
recomputes the saved values from the inputs. So its own derivatives include those of the saved values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype in which the first one is computed: float64 stays, everything else becomes
    float32."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis. The tangent of PyTorch's own raises in its backward pass (2.14: it is changed
    in place)."""
    if forward_ad._current_level < 0:
        return scores.softmax(-1)
    exponentials = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def in_order_of(x: Tensor, like: Tensor) -> Tensor:
    """`x` with the memory order of `like`, which has the same shape: the layout of `torch.empty_like(like)`."""
    order = sorted(range(like.dim()), key=lambda axis: like.stride(axis), reverse=True)
    wanted = torch.empty_like(like, device="meta").stride()
    if x.stride() == wanted:
        return x
    back = sorted(range(like.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def rstd_of(variance: Tensor, rstd: Tensor) -> Tensor:
    """`rstd` = 1 / sqrt(variance + eps) as it was computed, as a function of `variance`, for any derivative of it.

    eps is not needed: variance + eps is 1 / rstd^2, and changes exactly as the variance does.
    """
    rstd = rstd.detach().to(variance.dtype)
    return (variance - variance.detach() + rstd.square().reciprocal()).rsqrt()

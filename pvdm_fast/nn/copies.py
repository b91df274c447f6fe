"""Weights in autocast's dtype for the length of a pass: all cast by one operation, and found by the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvdm_fast.ops.derivatives import autocast_dtype

# Elements whose gradients are handed on together: 32 MB of float32, about what DistributedDataParallel sends at once,
# so that it sends the first while the rest is still computed.
GROUP = 8 << 20
# The backward pass takes first what was computed last. Casts, though first in a pass, must be as prompt as the step
# that adds a gradient to a parameter's. Else all of them would wait until the end.
PROMPT = 1 << 62


class Copies:
    """Copies of weights in `dtype`. They stand for the weights wherever autocast would cast to it."""

    def __init__(self, device: str, dtype: torch.dtype, weights: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self.device, self.dtype = device, dtype
        self._held = weights  # so that no other tensor can take the identity of one of them
        self._copies = {id(weight): copy for weight, copy in zip(weights, copies, strict=True)}

    def of(self, weight: Tensor) -> Tensor:
        """The copy of a weight; the weight itself where there is none, or where autocast has been turned off since."""
        copy = self._copies.get(id(weight))
        return weight if copy is None or autocast_dtype(self.device) is not self.dtype else copy


class _Kept(NamedTuple):
    weight: Tensor
    version: int
    copy: Tensor


@dataclass
class Kept:
    """What `kept` keeps: copies, by the weight and their dtype, and what `pvdm_fast.nn.joined` made, by its weights."""

    copies: dict[tuple[int, torch.dtype], _Kept] = field(default_factory=dict)
    joined: dict[tuple[int, ...], Any] = field(default_factory=dict)


# Each thread has its own: a network can run in two of them, under autocast in one alone.
_current: ContextVar[Copies | None] = ContextVar("copies", default=None)
active = _current.get  # None, where each weight stands for itself
_kept: ContextVar[Kept | None] = ContextVar("kept_copies", default=None)
kept_now = _kept.get  # None outside of `kept`


def of(weight: Tensor) -> Tensor:
    """What a layer computes with: the copy of `weight` where this pass has one. Compiled code casts by itself."""
    copies = active()
    return weight if copies is None or torch.compiler.is_compiling() else copies.of(weight)


def run_with(copies: Copies | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), in which `of` finds these copies."""
    token = _current.set(copies)
    try:
        return function(*arguments)
    finally:
        _current.reset(token)


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, to be called at any time, with the copies of now: for recomputation in the backward pass."""
    copies = _current.get()
    if copies is None or torch.compiler.is_compiling():
        return function
    return lambda *arguments: run_with(copies, function, *arguments)


@contextmanager
def kept() -> Iterator[None]:
    """Until its end, copies that are made without a gradient, and joined weights, are kept for the passes to come.

    A weight is cast again where it is another tensor or has been written to, by its `_version`. PyTorch doesn't count
    what is written through `weight.data`: don't do that inside.
    """
    token = _kept.set(Kept())
    try:
        yield
    finally:
        _kept.reset(token)


def make(device: str, dtype: torch.dtype, weights: Sequence[Tensor]) -> Copies:
    """The copies of weights: differentiable where gradients are on and a weight requires one."""
    if not torch.is_grad_enabled():
        return Copies(device, dtype, weights, _without_gradient(weights, dtype))
    copies = _cast(weights, dtype)
    trained = [index for index, weight in enumerate(weights) if weight.requires_grad]
    for group in _groups(trained, weights):
        linked = _Cast.apply([copies[index] for index in group], *(weights[index] for index in group))
        linked[0].grad_fn._set_sequence_nr(PROMPT)
        for index, copy in zip(group, linked, strict=True):
            copies[index] = copy
    return Copies(device, dtype, weights, copies)


def _without_gradient(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    store = _kept.get()
    if store is None or not all(map(can_be_kept, weights)):
        return _cast(weights, dtype)
    found = store.copies
    stale = [weight for weight in weights if not _is_current(found.get((id(weight), dtype)), weight)]
    for weight, copy in zip(stale, _cast(stale, dtype), strict=True):
        found[id(weight), dtype] = _Kept(weight, weight._version, copy)
    return [found[id(weight), dtype].copy for weight in weights]


def can_be_kept(weight: Tensor) -> bool:
    """Not where nothing counts what is written to it, nor in a CUDA graph, which is replayed when the copy is gone."""
    return not weight.is_inference() and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_current(entry: _Kept | None, weight: Tensor) -> bool:
    return entry is not None and entry.weight is weight and entry.version == weight._version


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of all tensors in their order of memory, outside autograd, by one operation."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        with torch.no_grad():
            torch._foreach_copy_(copies, list(tensors))
    return copies


def _groups(indices: Sequence[int], weights: Sequence[Tensor]) -> Iterator[list[int]]:
    """Neighbours, `GROUP` elements or more together."""
    group: list[int] = []
    elements = 0
    for index in indices:
        group.append(index)
        elements += weights[index].numel()
        if elements >= GROUP:
            yield group
            group, elements = [], 0
    if group:
        yield group


class _Cast(torch.autograd.Function):
    """Copies, made already, as functions of the weights; the gradients come back in the weights' dtype."""

    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # this is to be differentiated again
            return None, *(None if grad is None else grad.to(ctx.dtype) for grad in grads)
        wide = iter(_cast([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(wide) for grad in grads)

"""What registered operations do under autograd, forward-mode AD and `torch.func`.

An operation has one kernel for PyTorch's autograd keys, for all backends:

- If an input carries a tangent, the reference computes the operation in differentiable PyTorch operations, so that the
  tangent passes through. (Or a special kernel does: see `forward_mode` of `registry.register`.)
- If an input requires a gradient, the backend's kernel runs and the backward formula is recorded.
- Otherwise the backend's kernel runs, and nothing is recorded.

Backward operations are registered in the same way. Their own derivative is that of the reference's backward formula,
recomputed from the inputs. So double backward, and any higher order, is right on every backend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

log = logging.getLogger("pvdm_fast")

Formula = Callable[..., tuple[Any, ...]]


def infers(device: str) -> bool:
    """Whether operations for inference alone may be used: nothing wants a gradient, traces, transforms or casts."""
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or transforming()
    return not watched and not autocasts(device)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device. (PyTorch raises if asked for the device of tensors without
    memory.)"""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on a type of device; None where it is off."""
    return torch.get_autocast_dtype(device) if autocasts(device) else None


class without_autocast:
    """A block with autocast off for a type of device: 1 µs, where `torch.autocast(device, enabled=False)` takes 2.5."""

    def __init__(self, device: str) -> None:
        self.device, self.was_on = device, autocasts(device)

    def __enter__(self) -> None:
        if self.was_on:
            torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *_: object) -> None:
        if self.was_on:
            torch.set_autocast_enabled(self.device, True)


def tangent_of(tensor: Tensor) -> Tensor | None:
    """The tangent that forward-mode AD has attached to `tensor`."""
    return forward_ad.unpack_dual(tensor, level=0).tangent


def split_dual(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a tensor and its tangent. The tangent is zeros if there is none."""
    primal, tangent = forward_ad.unpack_dual(tensor, level=0)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def any_tangent(inputs: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) and tangent_of(value) is not None for value in inputs)


def records(*inputs: Any) -> bool:
    """Whether autograd records what is computed from `inputs`. If so, a kernel can't get value and tangent separately:
    a backward pass that runs while tangents exist needs them in the saved tensors."""
    torch_c: Any = torch._C
    return bool(torch_c.is_grad_enabled() and torch_c._any_requires_grad(*inputs))


def transforming() -> bool:
    """Whether forward-mode AD or a transform of `torch.func` is active, so that only operations that PyTorch can see
    through may compute."""
    # These names are PyTorch's own for it, unchanged from 2.9 to 2.14.
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


@cache  # so that each is logged once
def say(op: str, derivative: str) -> None:
    log.info("%s: %s through the reference, in PyTorch's own operations", op, derivative)


def by_reference(op: str, derivative: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function`, which takes an operation's arguments without the backend. It runs outside autocast, because
    dtypes are settled by now."""

    def run(*arguments: Any) -> Any:
        *inputs, _ = arguments
        say(op, derivative)
        with without_autocast(inputs[0].device.type):
            return function(*inputs)

    return run


def saves_everything(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """`setup_context` for `pulled_back`: saves every argument."""
    ctx.tensors = [isinstance(value, Tensor) for value in inputs]
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


# What a forward pass saves, as backward operations name it. It is made of their other arguments, through which
# `backward_of_inputs` of the reference takes all of the derivative.
SAVED = ("out", "lse", "mean", "rstd")


def pulled_back(overload: Any, function: Callable[..., Any]) -> Formula:
    """The backward formula of an operation whose value is that of `function`, which PyTorch can differentiate."""
    own = [argument.name not in SAVED for argument in overload._schema.arguments]

    def formula(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if tensor else other for tensor, other in zip(ctx.tensors, ctx.others, strict=True)]
        wanted = [index for index in range(len(inputs)) if ctx.needs_input_grad[index] and own[index]]
        if not wanted:
            return (None,) * len(inputs)

        vjp: Any = torch.func.vjp  # typed as if it returned an auxiliary value too

        def of_wanted(*tensors: Tensor) -> tuple[Tensor, ...]:
            arguments = list(inputs)
            for index, tensor in zip(wanted, tensors, strict=True):
                arguments[index] = tensor
            results = function(*arguments)
            return results if isinstance(results, tuple) else (results,)

        results, pull = vjp(of_wanted, *(inputs[index] for index in wanted))
        pairs = zip(results, gradients, strict=True)
        found = pull(tuple(torch.zeros_like(r) if g is None else g.to(r.dtype) for r, g in pairs))
        by_index = dict(zip(wanted, found, strict=True))
        return tuple(by_index.get(index) for index in range(len(inputs)))

    return formula


def differentiable(name: str, setup_context: Callable[..., None], formula: Formula) -> Any:
    """A `torch.autograd.Function` of an operation, applied to its arguments and to the function that computes them.

    Args:
        setup_context, formula: as of `torch.library.register_autograd`.
    """

    # A function of one level: the dispatcher takes `torch.func`'s levels apart before this is applied.
    class Differentiable(_SingleLevelFunction):
        apply: Any  # of its base in C++

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, run = arguments
            output = run(*inputs)
            ctx.set_materialize_grads(False)
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            for gradient in gradients:
                if gradient is not None:
                    return *formula(ctx, *gradients), None
            return (None,) * len(ctx.needs_input_grad)  # nothing flows back: autograd was asked to make no zeros for it

    Differentiable.__name__ = f"{name}Differentiable"
    return Differentiable


def autograd_kernel(overload: Any, function: Any, with_tangents: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of `overload` for the autograd keys.

    Args:
        function: its `differentiable`.
        with_tangents: takes the operation's arguments where one carries a tangent.
    """
    torch_c: Any = torch._C
    below, after_autograd = torch_c._AutoDispatchBelowAutograd, torch_c._after_autograd_keyset

    def kernel(keyset: Any, *arguments: Any) -> Any:
        keys = keyset & after_autograd

        def run(*inputs: Any) -> Any:
            with below():
                return overload.redispatch(keys, *inputs)

        def run_under_transforms(*inputs: Any) -> Any:
            # Levels under this one may record, though it has been recorded itself and its function runs without
            # gradients.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return run(*inputs)

        if forward_ad._current_level >= 0 and any_tangent(arguments):
            return with_tangents(*arguments)
        if not records(*arguments):
            return run(*arguments)
        if not torch_c._are_functorch_transforms_active():
            return function.apply(*arguments, run)
        with enable_single_level_autograd_function():
            return function.apply(*arguments, run_under_transforms)

    return kernel


def one_by_one(overload: Any) -> Callable[..., Any]:
    """The rule for `torch.func.vmap`: runs `overload` once per mapped element and stacks the results."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def at(index: int) -> list[Any]:
            return [
                value.select(dim, index) if isinstance(value, Tensor) and dim is not None else value
                for value, dim in zip(arguments, in_dims, strict=True)
            ]

        results = [overload(*at(index)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule

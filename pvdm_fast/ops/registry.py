"""How an operation becomes `torch.ops.pvdm_fast.<op>` and `<op>_backward`, each served by the backend that is chosen.

Every registered schema ends in `str backend`: the backend asked for when the operation was called ("auto" mostly).
The backward pass thereby asks for the same one, whatever thread it runs in and whatever was asked for since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice

_library = torch.library.Library("pvdm_fast", "DEF")


def _dispatch(op: str, direction: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        *inputs, backend = arguments
        module = choice.choose(op, backend, inputs)
        device = inputs[0].device.type
        if torch.is_autocast_enabled(device):  # the dtypes are settled by now: the kernels must not be cast again
            with torch.autocast(device, enabled=False):
                return getattr(module, direction)(*inputs)
        return getattr(module, direction)(*inputs)

    return run


def register(
    op: str,
    *,
    schema: str,
    backward_schema: str,
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Define `op` and `<op>_backward` with their schemas, fakes (which state the strides) and autograd formula.

    `fake` and `backward_fake` take the arguments without the trailing backend.
    """
    for name, signature, direction, shape_of in (
        (op, schema, "forward", fake),
        (f"{op}_backward", backward_schema, "backward", backward_fake),
    ):
        _library.define(f"{name}{signature}")
        _library.impl(name, _dispatch(op, direction), "CompositeExplicitAutograd")
        torch.library.register_fake(f"pvdm_fast::{name}", lambda *a, _fake=shape_of: _fake(*a[:-1]), lib=_library)

    def formula(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in gradients):  # nothing flows back: autograd was asked not to make zeros for it
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *gradients)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(f"pvdm_fast::{op}", formula, setup_context=setup, lib=_library)


def register_inference(op: str, *, schema: str, fake: Callable[..., Any]) -> None:
    """Define `op` without a gradient. `fake` takes the arguments without the trailing backend."""
    _library.define(f"{op}{schema}")
    _library.impl(op, _dispatch(op, "forward"), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pvdm_fast::{op}", lambda *a: fake(*a[:-1]), lib=_library)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)


def expect(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition`: the check of arguments at the border of the package."""
    if not condition:
        raise ValueError(message)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expect_real(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors have a dtype that the operations compute in."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: tensors must be float32, bfloat16, float16 or float64, not {tensor.dtype}.")

"""How an operation becomes `torch.ops.pvdm_fast.<op>` and `<op>_backward`, computed by the chosen backend.

Every registered schema ends in `str backend`: the backend that was asked for when the operation was called (mostly
"auto"). So the backward pass asks for the same one, in any thread, whatever was asked for since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.layout import PLANE_NAMES
from pvdm_fast.ops import derivatives
from pvdm_fast.ops.operation import Operation, choosing

_library = torch.library.Library("pvdm_fast", "DEF")

# What is registered, by its name (`geglu`, `geglu_backward`, ...), to be called from inside this package.
OPERATION: dict[str, Operation] = {}
# FLOPs of each operation: cost(direction, *arguments without the backend).
FLOPS: dict[str, Callable[..., int]] = {}


def _dispatch(op: str, direction: str, check: Callable[..., None]) -> Callable[..., Any]:
    run = choosing(op, direction)

    def checked(*arguments: Any) -> Any:
        check(*arguments[:-1])
        return run(*arguments)

    return checked


def _define(name: str, schema: str, check: Callable[..., None], fake: Callable[..., Any], run: Any) -> Any:
    """Define an operation without derivatives. Its fake checks the arguments too, before it makes shapes."""

    def checked_fake(*arguments: Any) -> Any:
        check(*arguments[:-1])
        return fake(*arguments[:-1])

    _library.define(f"{name}{schema}")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pvdm_fast::{name}", checked_fake, lib=_library)
    overload = getattr(torch.ops.pvdm_fast, name).default
    torch.library.register_vmap(f"pvdm_fast::{name}", derivatives.one_by_one(overload), lib=_library)
    return overload


def _differentiate(overload: Any, setup_context: Any, formula: Any, with_tangents: Any) -> Any:
    function = derivatives.differentiable(overload._opname, setup_context, formula)
    kernel = derivatives.autograd_kernel(overload, function, with_tangents)
    _library.impl(overload._opname, kernel, "Autograd", with_keyset=True)
    return function


def reference(op: str) -> Any:
    """The reference's module of an operation."""
    return choice.implementation("reference", op)


def register(
    op: str,
    *,
    schema: str,
    backward_schema: str,
    check: Callable[..., None],
    backward_check: Callable[..., None],
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    flops: Callable[..., int],
    forward_mode: Callable[..., Any] | None = None,
) -> tuple[Operation, Operation]:
    """Define `op` and `<op>_backward` with their schemas, checks, fakes (which state the strides) and derivatives.

    Args:
        check, backward_check: raise ValueError for arguments that don't fit, before anything is allocated or computed.
        fake, backward_fake: give results without values. These four take the arguments without the trailing backend.
        setup_context, backward: as of `torch.library.register_autograd`.
        flops: cost(direction, *arguments without the backend), direction "forward" or "backward".
        forward_mode: takes all arguments if one of them carries a tangent. With None, the reference computes, in
            operations that PyTorch differentiates.

    Returns:
        Both, to be called from here with their schemas' arguments.
    """
    FLOPS[op] = flops

    def compute(*inputs: Any) -> Any:
        check(*inputs)
        return reference(op).forward(*inputs)

    def compute_backward(*inputs: Any) -> Any:
        backward_check(*inputs)
        module = reference(op)
        return getattr(module, "backward_of_inputs", module.backward)(*inputs)

    overload = _define(op, schema, check, fake, _dispatch(op, "forward", check))
    with_tangents = forward_mode or derivatives.by_reference(op, "its forward-mode derivative", compute)
    function = _differentiate(overload, setup_context, backward, with_tangents)
    forwards = Operation(op, "forward", overload, check, function)

    run = _dispatch(op, "backward", backward_check)
    overload = _define(f"{op}_backward", backward_schema, backward_check, backward_fake, run)
    again = derivatives.by_reference(op, "derivatives of its backward pass", compute_backward)
    function = _differentiate(overload, derivatives.saves_everything, derivatives.pulled_back(overload, again), again)
    backwards = Operation(op, "backward", overload, backward_check, function)
    OPERATION[op], OPERATION[f"{op}_backward"] = forwards, backwards
    return forwards, backwards


def register_by_reference(
    op: str,
    name: str,
    direction: str,
    *,
    schema: str,
    check: Callable[..., None],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> Operation:
    """Define `name`, which runs the function `direction` of the modules of `op`, and whose derivatives of any order are
    those of the reference. `check` and `fake` take the arguments without the trailing backend."""
    FLOPS.setdefault(op, flops)

    def compute(*inputs: Any) -> Any:
        check(*inputs)
        return getattr(reference(op), direction)(*inputs)

    overload = _define(name, schema, check, fake, _dispatch(op, direction, check))
    again = derivatives.by_reference(op, "derivatives", compute)
    function = _differentiate(overload, derivatives.saves_everything, derivatives.pulled_back(overload, again), again)
    OPERATION[name] = Operation(op, direction, overload, check, function)
    return OPERATION[name]


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype if autocast is on for their device, otherwise unchanged."""
    if not torch._C._is_any_autocast_enabled():  # quicker to ask than for a device
        return tensors
    dtype = derivatives.autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expect_real(op: str, first: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all tensors have a dtype that the operations compute in, and share a device."""
    if first.dtype not in DTYPES:
        raise ValueError(f"{op}: tensors must be float32, bfloat16, float16 or float64, not {first.dtype}.")
    device = first.device
    for tensor in others:
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: tensors must be float32, bfloat16, float16 or float64, not {tensor.dtype}.")
        if tensor.device != device:
            raise ValueError(
                f"{op}: all tensors must be on one device, but some are on {device}, some {tensor.device}."
            )


def expect_shapes(op: str, **expected: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise ValueError unless each named tensor has its expected shape."""
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must be {tuple(shape)}, not {tuple(tensor.shape)}.")


def expect_dtype(op: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Raise ValueError unless each tensor, given by its name, has `dtype`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{op}: {name} must be {dtype} here, not {tensor.dtype}.")


def default_scale(qkv: Tensor) -> float:
    """The scale of attention's scores, d ** -0.5. Any number if there is no d, because the operation refuses such
    shapes."""
    return float(qkv.shape[-1]) ** -0.5 if qkv.dim() and qkv.shape[-1] else 1.0


def statistic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and log-sum-exps of tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tokens_of_planes(op: str, planes: Sequence[int]) -> int:
    """The tokens of planes given as (rows, columns, rows, columns, ...). Python's integers don't overflow.

    Raises:
        ValueError: there is no plane, an odd number of sizes, or a size below 1.
    """
    if len(planes) < 2 or len(planes) % 2 or min(planes) < 1:
        raise ValueError(
            f"{op}: planes must be (rows, columns, rows, columns, ...), each at least 1, not {list(planes)}."
        )
    return sum(rows * columns for rows, columns in zip(planes[::2], planes[1::2], strict=True))


def tokens_of_lattice(op: str, time: int, height: int, width: int) -> tuple[int, int]:
    """The tokens of a lattice, and of its three planes.

    Raises:
        ValueError: a size below 1.
    """
    if min(time, height, width) < 1:
        raise ValueError(f"{op}: time, height and width must be at least 1, not {(time, height, width)}.")
    return time * height * width, height * width + time * width + time * height


def sequence_length(op: str, plane: str, time: int, height: int, width: int) -> int:
    """The length of the lattice's axis that a plane's sequences run along.

    Raises:
        ValueError: there is no such plane.
    """
    if plane not in PLANE_NAMES:
        raise ValueError(f"{op}: plane must be one of {', '.join(PLANE_NAMES)}, not {plane!r}.")
    return time if plane == "xy" else height if plane == "yt" else width

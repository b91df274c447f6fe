"""`torch.ops.pvdm_fast.*` called directly: impossible sizes, wrong tensors, tensors without memory."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from comparison import assert_close
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast import ops, use_backend
from pvdm_fast.analysis.cases import SMALL, as_tuple, leaves
from pvdm_fast.analysis.recorder import OwnCalls
from pvdm_fast.backends import choice

HUGE = 2**63 - 1
SIZES = (HUGE, -HUGE, 2**62, 2**32, 2**31, 0, -1, 1, 2, 3)
everywhere = pytest.mark.parametrize("name", SMALL)
BACKENDS = [name for name in choice.BACKENDS if choice.unavailable(name) is None]


def calls_of(name: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The direct calls of both directions, with their arguments, detached."""
    case = SMALL[name]
    inputs = leaves(case.inputs(torch.float32))
    with OwnCalls() as recorder:
        results = as_tuple(case.run(**inputs))
        torch.autograd.grad(results, list(inputs.values()), [torch.randn_like(r) for r in results])
    return [(f, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)) for f, args in recorder.calls]


def sizes_changed(value: Any) -> list[Any]:
    """Other values in place of a size, or of each size in a list."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return list(SIZES)
    if isinstance(value, (list, tuple)) and value and type(value[0]) is int:
        return [[*value[:i], size, *value[i + 1 :]] for i in range(len(value)) for size in SIZES] + [[], value[:-1]]
    return []


def assert_refused_or_right(function: Any, arguments: list[Any], what: str) -> None:
    """A sentence says what is wrong; or what is asked for fits after all, and the result is the float64 reference's.

    Of a backward pass only sizes are compared: what it was given of the forward pass belongs to the other arguments.
    """
    try:
        results = as_tuple(function(*arguments))
    except (ValueError, RuntimeError) as error:  # a BackendError is a RuntimeError
        if len(str(error)) > 15:
            return
        raise AssertionError(what) from error
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments[:-1]]
    expected = as_tuple(function(*wide, "reference"))
    assert [r.shape for r in results] == [e.shape for e in expected], what
    for result, exact in zip(results, expected, strict=True):
        if "backward" not in str(function) and not (result.is_meta or exact.is_meta):
            assert_close(result, exact, OPERATION[result.dtype], what)


@everywhere
@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_sizes(name: str, backend: str) -> None:
    for function, arguments in calls_of(name):
        for index, value in enumerate(arguments[:-1]):
            for other in sizes_changed(value):
                changed = [*arguments[:index], other, *arguments[index + 1 : -1], backend]
                assert_refused_or_right(function, changed, f"{function} {index} {other}")


def test_planes_whose_product_wraps() -> None:
    """(2^63 - 1) x 2 + 6 x 1 tokens are 4 modulo 2^64."""
    planes = [HUGE, 2, 6, 1]
    for device in ("cpu", "meta"):
        x, weight, bias = (torch.ones(s, device=device) for s in ((1, 4, 5), (6, 5, 3, 3), (6,)))
        expand = torch.ones(3, 2, 5, device=device)
        calls = (
            lambda x=x, w=weight, b=bias: torch.ops.pvdm_fast.plane_conv(x, w, b, planes, None, "auto"),
            lambda x=x, b=bias[:5]: torch.ops.pvdm_fast.plane_norm(x, b, b, None, planes, 5, 1e-5, True, 0, "auto"),
            lambda x=x, w=expand: torch.ops.pvdm_fast.triplane_expand(x, w, w[..., 0], HUGE, 2, 6, "auto"),
        )
        for call in calls:
            with pytest.raises(ValueError, match=r"^(plane_conv|plane_norm|triplane_expand): .* tokens"):
                call()


@everywhere
def test_wrong_tensors(name: str) -> None:
    """A tensor of another shape, dtype or device in any place, in either direction."""
    chosen = random.Random(0)
    for function, arguments in calls_of(name):
        for index, value in enumerate(arguments):
            if not isinstance(value, Tensor):
                continue
            for other in (
                value[..., :-1], value[None], value.flatten(), value[:0], value.long(), value.to(torch.complex64),
                torch.tensor(1.0), torch.empty(0), value.expand(2, *value.shape), value.double(), value.to("meta"),
            ):  # fmt: skip
                backend = chosen.choice(BACKENDS)
                changed = [*arguments[:index], other, *arguments[index + 1 : -1], backend]
                assert_refused_or_right(
                    function, changed, f"{function} {index} {tuple(other.shape)} {other.dtype} {backend}"
                )


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_without_memory(name: str, dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides of both directions on the meta device are those of the reference's results."""
    case = SMALL[name]
    inputs = case.inputs(dtype)
    with use_backend("reference"):
        real, empty = leaves(inputs), leaves({n: t.to("meta") for n, t in inputs.items()})
        pairs = []
        for tensors in (real, empty):
            if case.op == "axial_attention" and "query" not in case.shapes and tensors is empty:
                results = as_tuple(_along(name, tensors["qkv"]))
            else:
                results = as_tuple(case.run(**tensors))
            pairs.append((*results, *torch.autograd.grad(results, list(tensors.values()), [r * 2 for r in results])))
    for expected, found in zip(*pairs, strict=True):
        assert found.is_meta
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        strides = zip(found.shape, found.stride(), expected.stride(), strict=True)
        # the stride of an axis with one element means nothing
        assert all(size == 1 or a == b for size, a, b in strides)


def _along(name: str, qkv: Tensor) -> Tensor:
    """The case's call, with its tables on the meta device too."""
    axis = name.rpartition("-")[2]
    length = qkv.shape[1] if axis == "time" else qkv.shape[2] * qkv.shape[3]
    tables = torch.empty(2, length, qkv.shape[-1], device="meta")
    return ops.axial_attention(qkv, axis, (tables[0], tables[1]))


@everywhere
def test_statistics_of_float64_are_float64(name: str) -> None:
    for function, arguments in calls_of(name):
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments[:-1]]
        for result in as_tuple(function(*wide, "reference")):
            assert result.dtype == torch.float64

"""Random changes to arguments of public functions: a right result, or one sentence before any kernel runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from comparison import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.analysis.cases import LAYOUT, SMALL, as_tuple
from pvdm_fast.backends.choice import BackendError
from pvdm_fast.layout import PlaneLayout

DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)
fuzzed = settings(max_examples=200, deadline=None, derandomize=True)


def changed(draw: Any, tensor: Tensor) -> Tensor:
    """Another number of axes, another length of one, another dtype, or swapped axes."""
    kind = draw(st.sampled_from(("length", "length", "dtype", "drop", "add", "swap", "scalar")))
    axis = draw(st.integers(0, tensor.dim() - 1))
    if kind == "length":
        length = draw(st.integers(0, 2 * tensor.shape[axis]))
        index = torch.arange(length) % tensor.shape[axis]
        return tensor.index_select(axis, index)
    if kind == "dtype":
        return tensor.to(draw(st.sampled_from(DTYPES)))
    if kind == "drop":
        return tensor.select(axis, 0)
    if kind == "add":
        return tensor.unsqueeze(axis)
    return tensor.transpose(axis, tensor.dim() - 1) if kind == "swap" else torch.tensor(1.0)


def assert_sentence(error: Exception) -> None:
    assert 15 < len(str(error)) < 1000 and "\n" not in str(error), repr(error)


@fuzzed
@given(st.data())
def test_changed_tensors(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SMALL)))
    case = SMALL[name]
    inputs = case.inputs(torch.float32)
    for victim in data.draw(st.sets(st.sampled_from(sorted(inputs)), min_size=1, max_size=2)):
        inputs[victim] = changed(data.draw, inputs[victim])
    try:
        results = as_tuple(case.run(**inputs))
    except (ValueError, BackendError) as error:
        assert_sentence(error)
        return
    with use_backend("reference"):
        expected = as_tuple(case.run(**{n: t.double() for n, t in inputs.items()}))
    for result, exact in zip(results, expected, strict=True):
        assert_close(result, exact, 2 * OPERATION.get(result.dtype, 1e-9), name)


size = st.one_of(st.integers(-2, 12), st.sampled_from((0.5, 3.0, True, None, "4", float("nan"))))


@given(size, size, size, st.one_of(st.integers(-2, 5), st.sampled_from((2.0, None))))
def test_triplane_layouts(time: Any, height: Any, width: Any, factor: Any) -> None:
    """Whole numbers of at least 1 are a layout, and even ones can be halved. Everything else is a sentence."""
    sizes = (time, height, width)
    good = all(type(value) is int and value >= 1 for value in sizes)
    try:
        layout = TriplaneLayout(*sizes)
    except ValueError as error:
        assert not good
        assert_sentence(error)
        return
    assert good and layout.num_tokens == height * width + time * width + time * height
    divides = type(factor) is int and factor >= 1 and not any(value % factor for value in sizes)
    try:
        smaller = layout.downsample(factor)
    except ValueError as error:
        assert not divides
        assert_sentence(error)
    else:
        assert divides and smaller.upsample(factor) == layout


@given(st.lists(st.tuples(size, size), max_size=3))
def test_plane_layouts(planes: list[tuple[Any, Any]]) -> None:
    good = bool(planes) and all(type(value) is int and value >= 1 for plane in planes for value in plane)
    try:
        layout = PlaneLayout(tuple(planes))
    except ValueError as error:
        assert not good
        assert_sentence(error)
    else:
        assert good and layout.num_tokens == sum(rows * columns for rows, columns in planes)


@pytest.mark.parametrize("wrong", [0, -1, 5, 1.5])
def test_groups_and_heads(wrong: Any) -> None:
    x, weight, bias = torch.randn(1, LAYOUT.num_tokens, 12), torch.ones(12), torch.zeros(12)
    with pytest.raises(ValueError, match=r"^plane_norm: ") as caught:
        ops.plane_norm(x, LAYOUT, weight, bias, groups=wrong)
    assert_sentence(caught.value)


@given(st.one_of(st.none(), st.lists(st.integers(-3, 90), max_size=5)))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_segments(offsets: list[int] | None) -> None:
    """From 0 to N without going back. Everything else is a sentence."""
    qkv = torch.randn(1, LAYOUT.num_tokens, 3, 1, 8)
    end = LAYOUT.num_tokens
    good = offsets is None or (len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == end)
    if good and offsets is not None:
        good = all(a < b for a, b in pairwise(offsets))
    try:
        result = ops.segment_attention(qkv, offsets)
    except ValueError as error:
        assert not good
        assert_sentence(error)
    else:
        assert good and torch.isfinite(result).all()

"""Scores that aren't finite: where the reference is finite, the kernels give its values."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import relative_error
from torch import Tensor

from pvdm_fast.backends.reference import axial_attention as axial_reference
from pvdm_fast.backends.reference import segment_attention as segment_reference

pytest.importorskip("triton")
from pvdm_fast.kernels import attention_block, axial_attention, segment_attention

pytestmark = pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
INF = math.inf
# By name: the infinite value of those keys, and how many keys of a sequence have it (None: all).
KINDS = {
    "one -inf": (-INF, 1),
    "most -inf": (-INF, 40),
    "all -inf": (-INF, None),
    "one +inf": (INF, 1),
    "all +inf": (INF, None),
    "one NaN": (math.nan, 1),
}


def planted(length: int, parts: int, kind: str) -> tuple[Tensor, Tensor]:
    """Two sequences (2, length, parts, 1, 16), with positive queries of one channel.

    The first few keys of the first sequence are infinite there, so that their scores are infinite for every query.
    """
    value, count = KINDS[kind]
    qkv = torch.randn(2, length, parts, 1, 16)
    k = parts - 2
    query = torch.randn(2, 1, 1, 16)
    for q in (qkv[:, :, 0], query) if parts == 3 else (query,):
        q[..., 0] = q[..., 0].abs() + 0.5
    count = length if count is None else min(count, length - 1)
    qkv[0, :count, k, :, 0] = value
    return qkv, query


def agree(actual: Tensor, expected: Tensor, name: str) -> None:
    assert torch.equal(actual.isfinite(), expected.isfinite()), f"{name}: not finite elsewhere than in the reference"
    finite = expected.isfinite()
    if finite.any():
        assert relative_error(actual[finite], expected[finite]) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [71, 64])
def test_segments(length: int, kind: str) -> None:
    """Full and partial blocks. In "most", the first blocks of keys hold nothing but -inf."""
    qkv, _ = planted(length, 3, kind)
    grad, offsets = torch.randn(2, length, 1, 16), [0, length]
    out, lse = segment_attention.forward(qkv, offsets, 0.25)
    expected, expected_lse = segment_reference.forward(qkv.double(), offsets, 0.25)
    agree(out, expected, "output")
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    dqkv = segment_attention.backward(grad, qkv, out, lse, offsets, 0.25)
    wide = segment_reference.backward(grad.double(), qkv.double(), expected, expected_lse, offsets, 0.25)
    for i, name in enumerate(("dq", "dk", "dv")):
        agree(dqkv[:, :, i], wide[:, :, i], name)


def along_time(qkv: Tensor, query: Tensor | None, kind: str, gradients: slice) -> None:
    qkv = qkv[:, :, None, None]
    query = None if query is None else query[:, :, None, None]
    out, lse = axial_attention.forward(qkv, query, None, None, "time", 0.25)
    double = qkv.double(), None if query is None else query.double()
    expected, expected_lse = axial_reference.forward(*double, None, None, "time", 0.25)
    agree(out, expected, "output")
    grad = torch.randn(out.shape)
    dqkv, dquery = axial_attention.backward(grad, qkv, query, None, None, out, lse, "time", 0.25)
    wide, wide_query = axial_reference.backward(
        grad.double(), *double, None, None, expected, expected_lse, "time", 0.25
    )
    agree(dqkv[gradients], wide[gradients], "gradient of qkv")
    agree(dquery[gradients], wide_query[gradients], "gradient of query")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [70, 128])
def test_long_sequences(length: int, kind: str) -> None:
    along_time(planted(length, 3, kind)[0], None, kind, slice(None))


@pytest.mark.parametrize("kind", KINDS)
def test_one_query(kind: str) -> None:
    qkv, query = planted(45, 2, kind)
    along_time(qkv, query[:, :, 0][:, None], kind, slice(None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [9, 33])
def test_short_sequences(length: int, kind: str) -> None:
    """At length 9 both sequences are in one tile. Gradients of the second one are NaN there (the module says so)."""
    along_time(planted(length, 3, kind)[0], None, kind, slice(0, 1) if length == 9 else slice(None))


def test_nan_in_a_block() -> None:
    """attention_block: NaN in one clip stays in that clip."""
    x = torch.randn(2, 5, 32)
    x[0, 2, 3] = math.nan
    weights = (
        torch.ones(32),
        torch.zeros(32),
        torch.randn(96, 32),
        torch.zeros(96),
        torch.randn(32, 32),
        torch.zeros(32),
    )
    out = attention_block.forward(x, *weights, 2, 4, 1e-5, (x.shape[1], 1))
    assert out[0].isnan().all() and out[1].isfinite().all()

"""Tables that are made once: where they are shared, and where they must not be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pvdm_fast.nn import constants
from pvdm_fast.nn.axial_transformer import time_rotation
from pvdm_fast.nn.constants import constant


@pytest.fixture(autouse=True)
def _fresh() -> None:
    constants._made.cache_clear()


def tables(like: Tensor, dtype: torch.dtype = torch.float32, length: int = 5) -> tuple[Tensor, Tensor]:
    return constant(time_rotation, like, dtype, length, 8)


def test_made_once_for_each_kind() -> None:
    x = torch.randn(2)
    first = tables(x)
    assert tables(torch.randn(7)) is first
    expected = time_rotation(5, 8)
    assert all(torch.equal(a, e) for a, e in zip(first, expected, strict=True))
    assert tables(x, torch.float64)[0].dtype == torch.float64
    assert len(tables(x, length=6)[0]) == 6
    assert tables(x.to("meta"))[0].is_meta and tables(x) is first


def test_fake_tensors_are_not_kept() -> None:
    with FakeTensorMode() as mode:
        assert isinstance(tables(mode.from_tensor(torch.randn(2)))[0], FakeTensor)
    assert type(tables(torch.randn(2))[0]) is Tensor


def test_tables_of_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        tables(torch.randn(2))
    sin, _ = tables(torch.randn(2))
    assert not sin.is_inference()
    x = torch.ones(5, 8, requires_grad=True)
    (x * sin).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, sin)


def test_nothing_of_a_transform_is_kept() -> None:
    inside: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        inside.append(tables(x)[0])
        return (x * inside[0]).sum()

    slope = torch.func.grad(loss)(torch.ones(5, 8))
    outside = tables(torch.ones(1))[0]
    assert outside is not inside[0] and torch.equal(slope, outside)

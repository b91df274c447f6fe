"""add_layer_norm in Triton's interpreter: narrow and wide rows, mixed dtypes, strides, hard values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends.triton.pointwise import FORMS, compare, same_again, wide
from comparison import assert_close
from inputs import DTYPES
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast import ops, use_backend
from pvdm_fast.backends import choice
from pvdm_fast.backends.reference import add_layer_norm as reference

pytestmark = pytest.mark.skipif(
    not choice.interpreting(), reason="needs Triton's interpreter: run with TRITON_INTERPRET=1"
)
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from pvdm_fast.kernels import add_layer_norm  # noqa: E402


def check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, grads: Any) -> tuple[Tensor, ...]:
    """grads: of the norm and of the sum (or None)."""
    results = add_layer_norm.forward(x, residual, weight, bias, 1e-5)
    total = x if residual is None else results[0]
    # The norm is that of the stored sum, so the reference gets the stored sum.
    expected = reference.forward(total.double(), None, weight.double(), bias.double(), 1e-5)
    compare(results[1:], expected[1:], "add_layer_norm")
    assert results[1].dtype == (x if residual is None else residual).dtype
    if residual is not None:
        assert_close(total, x.double() + residual.double(), OPERATION[residual.dtype], "sum")
    gradients = add_layer_norm.backward(*grads, total, weight, *results[2:])
    compare(gradients, reference.backward(*wide(*grads, total, weight, *results[2:])), "gradients")
    return *results, *gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 33, 128])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rows(dtype: torch.dtype, channels: int, with_residual: bool) -> None:
    shape = (2, 70, channels)  # 5 tiles of the backward pass, shared by 3 programs
    x, residual, *grads = ((2 * torch.randn(shape) + 1).to(dtype) for _ in range(4))
    weight, bias = torch.randn(2, channels)
    extra = grads[1] if with_residual else None
    same_again(lambda: check(x, residual if with_residual else None, weight, bias, (grads[0], extra)))


@pytest.mark.parametrize("channels", [513, add_layer_norm.WIDEST])
def test_wide_rows(channels: int) -> None:
    x, residual, *grads = (torch.randn(5, channels) for _ in range(4))
    check(x, residual, *torch.randn(2, channels), grads)


@pytest.mark.parametrize("form", FORMS)
def test_strides(form: str) -> None:
    x, residual, *grads = (FORMS[form](torch.randn(2, 9, 12)) for _ in range(4))
    check(x, residual, *torch.randn(2, 24)[:, ::2].unbind(), tuple(grads))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_mixed_dtypes(x_dtype: torch.dtype, residual_dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 9, 33).to(x_dtype), torch.randn(2, 9, 33).to(residual_dtype)
    grads = tuple(torch.randn(2, 9, 33).to(residual_dtype) for _ in range(2))
    check(x, residual, *torch.randn(2, 33).to(x_dtype), grads)


def test_mixed_dtypes_through_autograd() -> None:
    """As under autocast: the branch is bfloat16, the stream float32."""
    x, residual = torch.randn(2, 9, 16).bfloat16().requires_grad_(), torch.randn(2, 9, 16, requires_grad=True)
    with use_backend("triton"):
        total, normed = ops.add_layer_norm(x, residual, torch.ones(16), torch.zeros(16))
        (total.square().sum() + normed.pow(3).sum()).backward()
    assert x.grad is not None and residual.grad is not None
    assert x.grad.dtype == torch.bfloat16 and residual.grad.dtype == total.dtype == torch.float32
    assert torch.equal(x.grad, residual.grad.bfloat16())


def test_far_from_zero_and_constant_rows() -> None:
    x = torch.randn(4, 384) + torch.tensor([0.0, 10.0, 1000.0, -1000.0])[:, None]
    check(x, None, torch.ones(384), torch.zeros(384), (torch.randn(4, 384), None))
    _, normed, mean, rstd = add_layer_norm.forward(torch.full((2, 7), 5.0), None, torch.ones(7), torch.ones(7), 1e-5)
    assert (normed == 1).all() and (mean == 5).all()
    assert torch.allclose(rstd, torch.full((2,), 1e-5**-0.5))

"""Linear layers through oneDNN and PyTorch, against float64: forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close
from tolerances import FLOAT32_ERROR, OPERATION
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from pvdm_fast import use_backend
from pvdm_fast.backends import gemm
from pvdm_fast.nn import linear as module
from pvdm_fast.nn.linear import Linear, linear

FLOAT32 = OPERATION[torch.float32]
LARGE = (512, 96, 160)  # rows, K, M: above the threshold for oneDNN


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN got."""
    shapes: list[tuple[int, ...]] = []
    product = gemm.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append((*x.shape, len(weight)))
        return product(x, weight, bias)

    monkeypatch.setattr(gemm, "linear", noted)
    return shapes


def leaves(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def check(x: Tensor, weight: Tensor, bias: Tensor | None, view: Callable[..., Any] = lambda *t: t) -> None:
    """linear(*view(...)) and the gradients of the tensors behind the view, against float64."""
    ours = leaves(x, weight, bias)
    exact = leaves(*(None if t is None else t.double() for t in (x, weight, bias)))
    y, expected = linear(*view(*ours)), F.linear(*view(*exact))
    assert_close(y, expected, FLOAT32)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    for name, a, e in zip(("x", "weight", "bias"), ours, exact, strict=True):
        if a is not None:
            assert_close(a.grad, e.grad, FLOAT32, name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [LARGE, (64, 300, 257), (4100, 256, 4), (4100, 4, 256), (7, 5, 3), (1, 2048, 4096)])
def test_against_float64(sizes: tuple[int, int, int], bias: bool) -> None:
    rows, inner, outer = sizes
    check(torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(outer) if bias else None)


def test_large_products_are_onednns(products: list[tuple[int, ...]]) -> None:
    rows, inner, outer = LARGE
    check(torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(outer))
    assert products == [(rows, inner, outer), (rows, outer, inner), (inner, rows, outer)]  # y, dx, dweight transposed
    products.clear()
    check(torch.randn(16, 32), torch.randn(16, 32), None)
    assert not products


VIEWS: dict[str, Callable[..., Any]] = {
    "batch": lambda x, w, b: (x.view(2, 256, 96), w, b),
    "first": lambda x, w, b: (x.view(256, 2, 96)[:, :1], w, b),
    "transposed": lambda x, w, b: (x.view(96, 512).t(), w, b),
    "batch transposed": lambda x, w, b: (x.view(2, 96, 256).transpose(1, 2), w, b),
    "conv": lambda x, w, b: (x, w.view(160, 96, 1).squeeze(-1), b),
    "weight transposed": lambda x, w, b: (x, w.view(96, 160).t(), b),
    "rows": lambda x, w, b: (x, w[:100], b[:100]),
    "columns": lambda x, w, b: (x[:, :90], w[:, 6:], b),
    "expanded": lambda x, w, b: (x[:1].expand(512, 96), w, b),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views(view: Callable[..., Any]) -> None:
    check(torch.randn(512, 96), torch.randn(160, 96), torch.randn(160), view)


def test_gradient_of_stride_zero(products: list[tuple[int, ...]]) -> None:
    x, weight, bias = leaves(torch.randn(2, 256, 96), torch.randn(160, 96), torch.randn(160))
    linear(x, weight, bias).sum().backward()
    assert len(products) == 3
    assert_close(x.grad, weight.detach().double().sum(0).expand(2, 256, 96), FLOAT32, "x")
    assert_close(weight.grad, x.detach().double().sum((0, 1)).expand(160, 96), FLOAT32, "weight")
    assert torch.equal(bias.grad, torch.full((160,), 512.0))


def test_only_what_needs_a_gradient(products: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(512, 96), torch.randn(160, 96)
    linear(x, weight.clone().requires_grad_()).sum().backward()
    assert len(products) == 2
    assert not linear(x, weight).requires_grad


def test_left_to_torch(products: list[tuple[int, ...]]) -> None:
    """Other dtypes, autocast, the reference backend, compiled code, fake tensors."""
    x, weight, bias = torch.randn(512, 96), torch.randn(160, 96), torch.randn(160)
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with use_backend("reference"):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with FakeTensorMode() as mode:
        fake: list[Any] = [mode.from_tensor(t).requires_grad_() for t in (x, weight, bias)]
        y = linear(*fake)
        y.backward(torch.empty_like(y))
        assert y.shape == (512, 160) and fake[1].grad.shape == (160, 96)
    assert not products


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    layer = Linear(96, 160)
    x = torch.randn(512, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    actual = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT32)


def test_checkpointed() -> None:
    layer = Linear(96, 160)
    x = torch.randn(512, 96)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    actual = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), list(layer.parameters()))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_differentiable_twice() -> None:
    x, weight, bias = leaves(torch.randn(512, 96), torch.randn(160, 96), torch.randn(160))
    wide = leaves(x.double(), weight.double(), bias.double())

    def penalty(*inputs: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(linear(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((g / g.norm().detach()).square().sum() for g in first), inputs)

    for actual, expected in zip(penalty(x, weight, bias), penalty(*wide), strict=True):
        assert_close(actual, expected, FLOAT32_ERROR)


def test_transformed() -> None:
    """Forward mode, and a gradient per sample: like PyTorch's own layer, without a warning."""
    x, weight = torch.randn(4, 512, 96), torch.randn(160, 96)
    change = torch.randn_like(x)
    assert_close(
        jvp(lambda x: linear(x, weight), (x,), (change,))[1], change.double() @ weight.double().t(), FLOAT32_ERROR
    )
    each = vmap(grad(lambda w, x: linear(x, w).square().sum()), in_dims=(None, 0))(weight, x)
    assert_close(each[1], 2 * linear(x[1], weight).double().t() @ x[1].double(), FLOAT32_ERROR)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_onednn", lambda: False)
    assert module._by_onednn(torch.empty(512, 96), torch.empty(160, 96))
    check(torch.randn(512, 96), torch.randn(160, 96), torch.randn(160))

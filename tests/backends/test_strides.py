"""Every tensor of a native kernel may have any strides: sliced, transposed, expanded, overlapping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from backends import arguments
from backends.arguments import Call
from comparison import assert_close
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast.backends import choice, extensions, gemm
from pvdm_fast.nn import linear

ISAS = extensions.extension("_cpu").isas() if extensions.availability("cpu") is None else []
needs_cpu = pytest.mark.skipif(extensions.availability("cpu") is not None, reason=str(extensions.availability("cpu")))


@cache
def calls(dtype: torch.dtype) -> list[Call]:
    return arguments.recorded(dtype)


def check(backend: str, call: Call, index: int, form: Callable[[Tensor], Tensor]) -> None:
    what = f"{call.case}, {call.direction}, argument {index}, {form.__name__}"
    given = call.with_form(index, form)
    exact = call.of(choice.implementation("reference", call.op), *map(widened, given))
    for i, (a, e) in enumerate(zip(call.of(choice.implementation(backend, call.op), *given), exact, strict=True)):
        if e.norm() > 1e-6:  # with equal keys a query has no gradient
            assert_close(a, e, 2 * OPERATION[a.dtype], f"{what}: result {i}")
        else:
            assert a.shape == e.shape and (a.numel() == 0 or a.abs().max() < 1e-4), f"{what}: result {i}"


def widened(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) else argument


def check_all(backend: str, op: str) -> None:
    module = choice.implementation(backend, op)
    of_both = [call for call in calls(torch.float32) if call.op == op]
    assert {call.direction for call in of_both} == {"forward", "backward"}
    found = [call for call in of_both if hasattr(module, call.direction)]
    for call in found:
        for index, _ in call.tensors():
            for form in call.forms(index):
                check(backend, call, index, form)


@needs_cpu
@pytest.mark.parametrize("op", choice.SERVED["cpu"])
def test_cpu(isa: str, op: str) -> None:
    check_all("cpu", op)


@pytest.mark.parametrize("op", choice.SERVED["cuda"])
def test_cuda(device: ModuleType, op: str) -> None:
    """With the stand-in."""
    check_all("cuda", op)


def operands(rows: int, columns: int) -> Iterator[Tensor]:
    x = torch.randn(rows, columns)
    yield from (x, *(form(x) for form in arguments.FORMS))
    memory = torch.randn(4 * rows * columns + 4)
    for strides in ((1, 2), (2, 1), (0, 1), (1, 0), (columns + 3, 1), (1, rows + 3), (3, 3)):
        yield memory.as_strided((rows, columns), strides)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("width", [1, 3, 16])
@pytest.mark.parametrize("columns", [1, 2, 19])
def test_products(rows: int, width: int, columns: int) -> None:
    """oneDNN's product once read a bias of stride 0 as a dense one, and raised on overlapping weights."""
    for x in operands(rows, width):
        for weight in operands(columns, width):
            for bias in (None, torch.randn(1).expand(columns), torch.randn(2 * columns)[::2]):
                exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
                torch.testing.assert_close(gemm.linear(x, weight, bias).double(), exact, atol=1e-5, rtol=1e-5)
    for grad in operands(rows, columns):
        for x in operands(rows, width):
            exact = grad.double().t() @ x.double()
            torch.testing.assert_close(gemm.weight_gradient(grad, x).double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", arguments.FORMS)
def test_linear_layer(form: Callable[[Tensor], Tensor]) -> None:
    """`nn.linear` through oneDNN's product: forward, backward, and without autograd."""
    x, weight, bias, grad = (form(torch.randn(*shape)) for shape in ((256, 128), (136, 128), (136,), (256, 136)))
    assert linear._by_onednn(x, weight)
    exact = (x.double() @ weight.double().t()) + bias.double()
    torch.testing.assert_close(linear.product(x, weight, bias).double(), exact, atol=1e-4, rtol=1e-4)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    gradients = torch.autograd.grad(linear.linear(*leaves), leaves, grad)
    wide = grad.double()
    for a, e in zip(gradients, (wide @ weight.double(), wide.t() @ x.double(), wide.sum(0)), strict=True):
        assert_close(a, e, 1e-5)


@needs_cpu
def test_bindings_refuse_what_they_cannot_read() -> None:
    """Even if a launcher forgets something, no memory outside a tensor is read."""
    module, out, statistic = extensions.extension("_cpu"), torch.empty(1, 6, 8), torch.empty(1, 1, 2)
    for bad in (torch.ones(1).expand(8), torch.ones(16)[::2]):
        for weight, bias in ((bad, torch.ones(8)), (torch.ones(8), bad)):
            tensors = (torch.randn(1, 6, 8), weight, bias, None, statistic, statistic.clone())
            with pytest.raises(ValueError, match="last axis must be dense"):
                module.plane_norm_forward(tensors, out, [6, 1], 2, 1e-5, False, 0, 1)


HUGE = 2**63 - 1


@needs_cpu
@pytest.mark.parametrize("planes", [[HUGE, 2, 6, 1], [2**32, 2**32, 6, 1], [HUGE, 1, HUGE, 1, 8, 1], [2**61, 1]])
def test_products_of_sizes_do_not_wrap(planes: list[int]) -> None:
    """Modulo 2^64, the tokens of such planes match a tensor's, and it would be read far beyond its end."""
    module, x, out = extensions.extension("_cpu"), torch.randn(1, 6, 8), torch.empty(1, 6, 8)
    statistics = (torch.empty(1, len(planes) // 2, 2) for _ in range(2))
    with pytest.raises(ValueError, match="more than 2"):
        module.plane_norm_forward(
            (x, torch.ones(8), torch.ones(8), None, *statistics), out, planes, 2, 1e-5, False, 0, 1
        )
    with pytest.raises(ValueError, match="more than 2"):
        module.plane_conv_unfold(x, torch.empty(6, 72), planes, 0, 1)


@needs_cpu
@pytest.mark.parametrize("sizes", [(HUGE, 2, 3), (2**32, 2**32, 2**32), (2, 2**62, 1)])
def test_layouts_do_not_wrap(sizes: tuple[int, int, int], emulated_device: ModuleType) -> None:
    x = torch.empty(1, 6, 8)
    for module, target in ((extensions.extension("_cpu"), (1,)), (emulated_device, (0, 0))):
        workspace = () if len(target) == 1 else (torch.empty(6),)
        with pytest.raises(ValueError, match="more than 2"):
            module.triplane_expand_sums(x, torch.empty(1, 6, 8), *workspace, *sizes, *target)
        with pytest.raises(ValueError, match="more than 2"):
            module.triplane_slice_forward(x, torch.ones(8), torch.ones(3, 8), x, 0, *sizes, *target)
    for call in (
        lambda: emulated_device.triplane_expand_workspace(1, 8, *sizes),
        lambda: emulated_device.triplane_slice_workspace(1, 8, 0, *sizes),
        lambda: emulated_device.triplane_expand_workspace(HUGE, 8, 2, 3, 4),
        lambda: emulated_device.plane_norm_workspace(1, 8, 2, [HUGE, 2, 6, 1]),
        lambda: emulated_device.plane_norm_workspace(HUGE, 8, 2, [6, 1]),
    ):
        with pytest.raises(ValueError, match="more than 2"):
            call()

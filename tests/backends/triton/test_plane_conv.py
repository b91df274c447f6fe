"""plane_conv in Triton's interpreter: tiles, parts of the inner axis, strides, weight formats, cuDNN's choice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import assert_close
from inputs import DTYPES, transposed
from tolerances import CONV_SUM, OPERATION
from torch import Tensor

from pvdm_fast import ops, use_backend
from pvdm_fast.backends import choice
from pvdm_fast.backends.reference import plane_conv as reference
from pvdm_fast.backends.rows import order_of
from pvdm_fast.layout import PlaneLayout, TriplaneLayout

pytestmark = pytest.mark.skipif(
    not choice.interpreting(), reason="needs Triton's interpreter: run with TRITON_INTERPRET=1"
)
triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

from backends.triton.interpreter import arriving  # noqa: E402

from pvdm_fast.kernels import arrivals, plane_conv, plane_conv_backward, plane_conv_product  # noqa: E402
from pvdm_fast.kernels.configs import ANY, ConfigTable, assume  # noqa: E402
from pvdm_fast.kernels.launch import Config, watch  # noqa: E402

ODD = TriplaneLayout(3, 5, 7)
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "channels first": lambda t: t.mT.contiguous().mT,
    "stride 0 tokens": lambda t: t[:, :1].expand_as(t),
    "all stride 0": lambda t: t[:1, :1, :1].expand_as(t),
}


def configure(monkeypatch: pytest.MonkeyPatch, table: ConfigTable, config: Config) -> None:
    monkeypatch.setattr(table, "entries", {(ANY, ANY, ANY): config})
    monkeypatch.setattr(table, "asked", {})


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a large GPU: the few programs of small inputs share their inner axis."""
    monkeypatch.setitem(plane_conv_product.MULTIPROCESSORS, "interpreter", 64)
    monkeypatch.setattr(plane_conv_product, "LEAST_STEPS", 1)


def add_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on AMD's GPUs: kernels of their own add parts and arrange weights."""
    for module in (plane_conv_product, plane_conv_backward):
        monkeypatch.setattr(module, "counters_for", lambda *arguments: None)


def check_every_way(monkeypatch: pytest.MonkeyPatch, inputs: tuple[Tensor, ...], layout: PlaneLayout) -> None:
    """The same bits again, whichever program comes last, and where kernels of their own add."""
    first = check(*inputs, layout)
    with arriving(lambda count: range(count)[::-1]):
        second = check(*inputs, layout)
    counters = arrivals.counters_for(inputs[0], 1, 1)
    assert counters is not None and not counters.any()
    add_apart(monkeypatch)
    third = check(*inputs, layout)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


def draw(layout: PlaneLayout, channels: int, written: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, ...]:
    """x, weight, bias and the incoming gradient."""
    x, grad = (torch.randn(batch, layout.num_tokens, c).to(dtype) for c in (channels, written))
    weight = torch.randn(written, channels, 3, 3) / (3 * channels**0.5)
    return x, weight.to(dtype), torch.randn(written).to(dtype), grad


def check(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, layout: PlaneLayout) -> tuple[Tensor, ...]:
    """Forward and backward against the float64 reference. Returns all results."""
    out = plane_conv.forward(x, weight, bias, layout.sizes)
    expected = reference.forward(x.double(), weight.double(), bias.double(), layout.sizes)
    assert out.dtype == x.dtype and out.is_contiguous()
    assert_close(out, expected, OPERATION[x.dtype], "output")
    actual = plane_conv.backward(grad, x, weight, layout.sizes, [True, True])
    gradients = reference.backward(grad.double(), x.double(), weight.double(), layout.sizes, [True, True])
    for name, a, e in zip(("x", "weight", "bias"), actual, gradients, strict=True):
        order = order_of(weight) if name == "weight" else torch.contiguous_format
        assert a.dtype == x.dtype and a.is_contiguous(memory_format=order)
        assert_close(a, e, CONV_SUM[a.dtype], f"gradient of {name}")
    return out, *actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "written"), [(3, 5), (33, 3), (5, 70), (72, 20)])
def test_values(dtype: torch.dtype, channels: int, written: int) -> None:
    """Narrow and wide on either side, several tiles on every axis, and tiles that span planes and batch elements."""
    check(*draw(ODD, channels, written, dtype), ODD)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_parts_are_added_in_order(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Several steps per part, fewer in the last one."""
    assert plane_conv_product.parts_of(torch.device("cpu"), 3, 18) == 16
    check_every_way(monkeypatch, draw(ODD, 70, 20, dtype), ODD)


def check_residual(dtype: torch.dtype, form: Callable[[Tensor], Tensor], channels: int = 20) -> None:
    """Forward with a residual of any strides, which is left as it is."""
    x, weight, bias, grad = draw(ODD, channels, 12, dtype)
    residual = form(grad)
    before = residual.clone()
    out = plane_conv.forward(x, weight, bias, ODD.sizes, residual)
    wide = (t.double() for t in (x, weight, bias))
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, reference.forward(*wide, ODD.sizes, before.double()), OPERATION[dtype])
    assert torch.equal(residual, before)


@pytest.mark.parametrize("form", ["transposed", "all stride 0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(dtype: torch.dtype, form: str) -> None:
    check_residual(dtype, FORMS[form])


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("one_launch", [True, False])
def test_residual_is_added_to_the_sum_of_parts(monkeypatch: pytest.MonkeyPatch, one_launch: bool) -> None:
    if not one_launch:
        add_apart(monkeypatch)
    check_residual(torch.bfloat16, FORMS["channels first"])


def test_residual_of_the_vendors_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, plane_conv_product.CHOICE, plane_conv_product.ALWAYS)
    check_residual(torch.float32, FORMS["transposed"])


@pytest.mark.slow
def test_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs and steps, planes of several tiles."""
    for table in (plane_conv_product.CONV, plane_conv_backward.WEIGHT):
        configure(monkeypatch, table, plane_conv_product.tile(16, 32, 16, 4, 1))
    configure(monkeypatch, plane_conv_product.ADD, Config({"BLOCK": 64}))
    configure(monkeypatch, plane_conv_backward.ARRANGE, Config({"BLOCK_C": 16}))
    monkeypatch.setitem(plane_conv_product.MULTIPROCESSORS, "interpreter", 48)
    layout = PlaneLayout(((5, 3), (2, 7)))
    check_every_way(monkeypatch, draw(layout, 34, 40, torch.float32), layout)


@pytest.mark.parametrize("planes", [((1, 1), (1, 1), (1, 1)), ((1, 7),), ((2, 1), (1, 2), (4, 4)), ((1, 1), (9, 3))])
@pytest.mark.parametrize("batch", [1, 3])
def test_small_planes(planes: tuple[tuple[int, int], ...], batch: int) -> None:
    layout = PlaneLayout(planes)
    check(*draw(layout, 6, 4, torch.float32, batch), layout)


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("form", FORMS)
def test_strides(form: str, channels: int) -> None:
    """Narrow tensors are read by their strides, wider ones need dense channels."""
    x, weight, bias, grad = draw(ODD, channels, channels, torch.float32)
    before = x.clone(), weight.clone(), grad.clone()
    check(FORMS[form](x), weight, bias, FORMS[form](grad), ODD)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, grad), before, strict=True))


def test_formats_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """channels_last needs no copy. Slices and transposed views are read correctly. Nothing is cached."""
    x, weight, bias, grad = draw(ODD, 5, 6, torch.float32)
    dense = weight.to(memory_format=torch.channels_last)
    assert plane_conv_product.packed(dense).data_ptr() == dense.data_ptr()
    expected = check(x, weight, bias, grad, ODD)
    padded = torch.randn(12, 10, 3, 4)
    padded[::2, ::2, :, :3] = weight
    turned = weight.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (dense, padded[::2, ::2, :, :3], turned):
        assert all(torch.equal(a, b) for a, b in zip(check(x, other, bias, grad, ODD), expected, strict=True))
    assert check(x, dense, bias, grad, ODD)[2].stride() == dense.stride(), "no optimizer step has to copy it"
    add_apart(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(check(x, dense, bias, grad, ODD), expected, strict=True))
    for form in (weight, dense):
        form.data.mul_(2)  # doesn't change the version counter
        bias.data.mul_(2)
        torch.testing.assert_close(plane_conv.forward(x, form, bias, ODD.sizes) / 2, expected[0])
        bias.data.div_(2)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(needs: tuple[bool, bool]) -> None:
    x, weight, _, grad = draw(ODD, 5, 6, torch.float32)
    every = plane_conv.backward(grad, x, weight, ODD.sizes, [True, True])
    some = plane_conv.backward(grad, x, weight, ODD.sizes, needs)
    for needed, a, e in zip(needs, some, every, strict=False):
        assert torch.equal(a, e) if needed else a.shape == (0,)
    if needs[1]:  # the bias's is made on the way
        assert torch.equal(some[2], every[2])
    assert_close(some[2], every[2], OPERATION[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_vendor(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """If the table chooses the vendor's convolution, results are the same. Only the weight's gradient is our
    kernel's."""
    configure(monkeypatch, plane_conv_product.CHOICE, plane_conv_product.ALWAYS)
    x, weight, bias, grad = draw(ODD, 20, 12, dtype)
    check(x, weight.to(memory_format=torch.channels_last), bias, grad, ODD)
    check(*draw(ODD, 12, 20, dtype), ODD)
    assert launches(ODD, 20, 12, "interpreter") == ["plane_conv_backward_dweight"]


def test_choice() -> None:
    """By shape and architecture. Never in the interpreter, where tests want to see our kernel."""
    for architecture, expected in (("sm80", False), ("sm90", True), ("gfx942", False), ("interpreter", False)):
        with assume(architecture):
            large, small = (torch.empty(batch, 2048, 512, device="meta") for batch in (4, 1))
            assert plane_conv_product.vendor_is_chosen(large, 512) == expected
            assert not plane_conv_product.vendor_is_chosen(large, 256)
            assert not plane_conv_product.vendor_is_chosen(small, 512)


def launches(layout: PlaneLayout, channels: int, written: int, architecture: str, batch: int = 1) -> list[str]:
    """Names of the kernels that forward and backward launch in bfloat16, in order. The weight is in
    channels_last."""
    x, weight, bias, grad = (t.to("meta") for t in draw(layout, channels, written, torch.bfloat16, batch))
    names: list[str] = []
    with assume(architecture), watch(lambda kernel, *_: names.append(kernel.__name__)):
        plane_conv.forward(x, weight, bias, layout.sizes)
        plane_conv.backward(grad, x, weight, layout.sizes, [True, True])
    return names


def test_launches() -> None:
    """One for all planes. Few tokens: parts, on AMD's GPUs added by a second kernel."""
    alone, shared = ["plane_conv_forward"], ["plane_conv_forward", "plane_conv_forward_add"]
    weight = ["plane_conv_backward_dweight", "plane_conv_backward_arrange"]
    few = TriplaneLayout(2, 4, 4)
    for architecture in ("sm80", "sm90", "sm100", "sm120"):
        assert launches(few, 512, 512, architecture) == alone + alone + weight[:1]
    assert launches(few, 512, 512, "gfx942") == shared + shared + weight
    assert launches(TriplaneLayout(4, 8, 8), 512, 512, "sm90") == alone + alone + weight[:1]
    assert launches(TriplaneLayout(16, 32, 32), 256, 256, "sm90", 8) == alone + alone + weight


def test_gradients_through_the_operation() -> None:
    """`.sum().backward()` and optimizer steps, through the registered operation."""
    x = torch.randn(2, ODD.num_tokens, 5)
    conv = torch.nn.Conv2d(5, 6, 3)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    for _ in range(2):
        expected = reference.forward(x, conv.weight, conv.bias, ODD.sizes)
        with use_backend("triton"):
            out = ops.plane_conv(x, ODD, conv.weight, conv.bias)
            torch.testing.assert_close(out, expected)
            optimizer.zero_grad()
            out.sum().backward()
        gradients = torch.autograd.grad(expected.sum(), (conv.weight, conv.bias))
        torch.testing.assert_close((conv.weight.grad, conv.bias.grad), gradients, rtol=1e-5, atol=1e-4)
        optimizer.step()

"""plane_conv on the CPU: every instruction set, odd sizes, strides, chunks of the workspace, weights that change."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close, relative_error
from inputs import DTYPES, transposed
from tolerances import CONV_SUM, OPERATION
from torch import Tensor

from pvdm_fast import ops
from pvdm_fast.backends import extensions, gemm
from pvdm_fast.backends.cpu import plane_conv
from pvdm_fast.backends.reference import plane_conv as reference
from pvdm_fast.backends.rows import order_of
from pvdm_fast.layout import PlaneLayout, TriplaneLayout

pytestmark = pytest.mark.skipif(extensions.availability("cpu") is not None, reason=str(extensions.availability("cpu")))
ODD = TriplaneLayout(3, 5, 7)
MANY = plane_conv.MANY
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "channels first": lambda t: t.mT.contiguous().mT,
    "stride 0 tokens": lambda t: t[:, :1].expand_as(t),
    "all stride 0": lambda t: t[:1, :1, :1].expand_as(t),
}


@pytest.fixture(params=[0, math.inf], ids=["by convolution", "folded"], autouse=True)
def gradient_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with both ways to the gradient of x, whatever the sizes would choose."""
    monkeypatch.setattr(plane_conv, "MANY", request.param)


def draw(layout: PlaneLayout, channels: int, written: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, ...]:
    """x, weight, bias and the incoming gradient."""
    x, grad = (torch.randn(batch, layout.num_tokens, c).to(dtype) for c in (channels, written))
    weight = torch.randn(written, channels, 3, 3) / (3 * channels**0.5)
    return x, weight.to(dtype), torch.randn(written).to(dtype), grad


def check(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, layout: PlaneLayout) -> tuple[Tensor, ...]:
    """Forward and backward against the float64 reference. Returns all results."""
    out = plane_conv.forward(x, weight, bias, layout.sizes)
    expected = reference.forward(x.double(), weight.double(), bias.double(), layout.sizes)
    assert_close(out, expected, OPERATION[x.dtype], "output")
    actual = plane_conv.backward(grad, x, weight, layout.sizes, [True, True])
    gradients = reference.backward(grad.double(), x.double(), weight.double(), layout.sizes, [True, True])
    for name, a, e in zip(("x", "weight", "bias"), actual, gradients, strict=True):
        order = order_of(weight) if name == "weight" else torch.contiguous_format
        assert a.dtype == x.dtype and a.is_contiguous(memory_format=order)
        assert_close(a, e, CONV_SUM[a.dtype], f"gradient of {name}")
    return out, *actual


@pytest.mark.usefixtures("poisoned", "isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "written"), [(1, 1), (3, 5), (5, 33), (33, 3), (256, 8)])
def test_values(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, channels: int, written: int) -> None:
    poison = lambda rows, columns, dtype: torch.full((rows, columns), float("nan"), dtype=dtype)  # noqa: E731
    monkeypatch.setattr(plane_conv, "_workspace", poison)
    inputs = draw(ODD, channels, written, dtype)
    first, second = (check(*inputs, ODD) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("planes", [((1, 1), (1, 1), (1, 1)), ((1, 7),), ((2, 1), (1, 2), (4, 4)), ((1, 1), (9, 3))])
@pytest.mark.parametrize("batch", [1, 3])
def test_small_planes(planes: tuple[tuple[int, int], ...], batch: int) -> None:
    layout = PlaneLayout(planes)
    check(*draw(layout, 6, 4, torch.float32, batch), layout)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", FORMS)
def test_strides(form: str) -> None:
    x, weight, bias, grad = draw(ODD, 24, 8, torch.float32)
    before = x.clone(), weight.clone(), grad.clone()
    check(FORMS[form](x), weight, bias, FORMS[form](grad), ODD)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, grad), before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_rounding_only(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A small workspace, so that chunks begin and end inside planes. The smallest holds 64 of 142 rows."""
    monkeypatch.setattr(plane_conv, "WORKSPACE", 1)
    assert len(list(plane_conv._chunks(142, 20, dtype))) == 3
    check(*draw(ODD, 20, 6, dtype), ODD)


@pytest.mark.usefixtures("isa", "poisoned")
@pytest.mark.parametrize("form", ["transposed", "all stride 0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, form: str) -> None:
    """Of any strides, over several chunks. It is left as it is."""
    monkeypatch.setattr(plane_conv, "WORKSPACE", 1)
    x, weight, bias, grad = draw(ODD, 20, 6, dtype)
    residual = FORMS[form](grad)
    before = residual.clone()
    out = plane_conv.forward(x, weight, bias, ODD.sizes, residual)
    wide = (t.double() for t in (x, weight, bias))
    assert_close(out, reference.forward(*wide, ODD.sizes, before.double()), OPERATION[dtype])
    assert torch.equal(residual, before)


def test_workspace_is_bounded() -> None:
    for rows, channels in ((16384, 2048), (2048, 512), (100, 3)):
        chunks = list(plane_conv._chunks(rows, channels, torch.float32))
        assert [first for first, _ in chunks] == [sum(n for _, n in chunks[:i]) for i in range(len(chunks))]
        assert sum(n for _, n in chunks) == rows
        assert max(n for _, n in chunks) * 9 * channels * 4 <= plane_conv.WORKSPACE


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(needs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as of all gradients together. The weight's alone is never made from the unfolded gradient."""
    x, weight, _, grad = draw(ODD, 5, 6, torch.float32)
    some = plane_conv.backward(grad, x, weight, ODD.sizes, needs)
    if not needs[0]:
        monkeypatch.setattr(plane_conv, "MANY", math.inf)
    every = plane_conv.backward(grad, x, weight, ODD.sizes, [True, True])
    for needed, a, e in zip((*needs, True), some, every, strict=True):
        assert torch.equal(a, e) if needed else a.shape == (0,)


def test_weights_that_change() -> None:
    """Nothing about a weight is cached: in-place updates, views of one storage and other formats are read."""
    x, weight, bias, _ = draw(ODD, 5, 6, torch.float32)
    conv = torch.nn.Conv2d(5, 6, 3)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    for _ in range(2):
        loss = ops.plane_conv(x, ODD, conv.weight, conv.bias).square().mean()
        expected = reference.forward(x, conv.weight, conv.bias, ODD.sizes).square().mean()
        torch.testing.assert_close(loss, expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        first = ops.plane_conv(x, ODD, conv.weight, conv.bias)
        conv.weight.data.mul_(2)  # doesn't change the version counter
        conv.bias.data.mul_(2)
        torch.testing.assert_close(ops.plane_conv(x, ODD, conv.weight, conv.bias), 2 * first)
    both = torch.stack((weight, -weight))
    torch.testing.assert_close(
        plane_conv.forward(x, both[0], bias, ODD.sizes), -plane_conv.forward(x, both[1], -bias, ODD.sizes)
    )
    check(x, weight.to(memory_format=torch.channels_last), bias, torch.randn(2, ODD.num_tokens, 6), ODD)


def test_bfloat16_error_is_the_eager_one() -> None:
    """Results and gradients have at most twice the error of F.conv2d in bfloat16."""
    layout = TriplaneLayout(8, 8, 8)
    x, weight, bias, grad = draw(layout, 64, 48, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    images = [p.permute(0, 3, 1, 2) for p in layout.split(leaves[0])]
    eager = reference._pack([F.conv2d(image, leaves[1], leaves[2], padding=1) for image in images])
    eager_all = (eager, *torch.autograd.grad(eager, leaves, grad))
    wide = [t.double() for t in (x, weight, bias)]
    exact = (
        reference.forward(*wide, layout.sizes),
        *reference.backward(grad.double(), wide[0], wide[1], layout.sizes, [True, True]),
    )
    ours = (
        plane_conv.forward(x, weight, bias, layout.sizes),
        *plane_conv.backward(grad, x, weight, layout.sizes, [True, True]),
    )
    for a, b, e in zip(ours, eager_all, exact, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(b, e)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*draw(ODD, 40, 8, torch.float32, 3), ODD)
    finally:
        torch.set_num_threads(before)


def test_python_threads_do_not_share_the_workspace() -> None:
    cases = [draw(ODD, 16 + i, 8, torch.float32) for i in range(4)]
    alone = [plane_conv.forward(*case[:3], ODD.sizes) for case in cases]

    def often(index: int) -> list[Tensor]:
        return [plane_conv.forward(*cases[index][:3], ODD.sizes) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for expected, results in zip(alone, pool.map(often, range(4)), strict=True):
            assert all(torch.allclose(result, expected, atol=1e-6) for result in results)


def test_workspace_made_in_inference_mode_serves_training() -> None:
    x, weight, bias, _ = draw(ODD, 40, 6, torch.float32)
    plane_conv._kept.__dict__.clear()
    with torch.inference_mode():
        plane_conv.forward(x, weight, bias, ODD.sizes)
    ops.plane_conv(x, ODD, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("onednn", [True, False])
def test_both_ways_to_the_product(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    if onednn and not gemm._onednn():
        pytest.skip("this torch was built without oneDNN: install one with it")
    monkeypatch.setattr(gemm, "_onednn", lambda: onednn)
    check(*draw(ODD, 12, 8, torch.float32), ODD)


def test_bfloat16_without_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane_conv, "compute_dtype", lambda dtype: torch.float32)
    check(*draw(ODD, 12, 8, torch.bfloat16), ODD)


def test_border_refuses() -> None:
    module: Any = extensions.extension("_cpu")
    x, out = torch.randn(1, 12, 4), torch.empty(12, 36)
    for arguments, message in (
        ((x, out, [3, 3], 0, 1), "has not the shape"),
        ((x, out, [3, 4], 1, 1), "not so many rows"),
        ((x, out, [3], 0, 1), "rows, columns"),
        ((x, out.to(torch.bfloat16), [3, 4], 0, 1), "share a dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            module.plane_conv_unfold(*arguments)


def test_many_tokens_take_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sizes alone: 4 tokens a channel or more. Nothing is folded then."""
    monkeypatch.setattr(plane_conv, "MANY", MANY)
    folded: list[int] = []
    fold = plane_conv._input_gradient
    monkeypatch.setattr(plane_conv, "_input_gradient", lambda *args: folded.append(1) or fold(*args))
    for batch, times in ((2, 0), (1, 1)):  # 142 and 71 tokens of 32 channels
        x, weight, _, grad = draw(ODD, 32, 5, torch.float32, batch)
        plane_conv.backward(grad, x, weight, ODD.sizes, [True, True])
        assert len(folded) == times

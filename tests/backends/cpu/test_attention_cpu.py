"""Both attention operations on the CPU, in every instruction set of this machine, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from comparison import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast.backends import extensions
from pvdm_fast.backends.cpu import axial_attention, segment_attention
from pvdm_fast.backends.reference import axial_attention as axial_reference
from pvdm_fast.backends.reference import segment_attention as segment_reference

pytestmark = [
    pytest.mark.skipif(extensions.availability("cpu") is not None, reason=str(extensions.availability("cpu"))),
    pytest.mark.usefixtures("poisoned_likes"),
]
LENGTHS = (1, 2, 16, 17, 33, 77, 300)
WIDTHS = (8, 12, 16, 32, 40, 64, 80, 128, 256)


def by_head(tokens: int, heads: int, width: int, batch: int = 2) -> Tensor:
    """(B, N, 3, heads, d) in the denoiser's memory order: each head's q, k, v in turn."""
    return torch.randn(batch, tokens, heads, 3, width).transpose(2, 3)


def run(qkv: Tensor, grad: Tensor, offsets: list[int], scale: float) -> dict[str, Tensor]:
    out, lse = segment_attention.forward(qkv, offsets, scale)
    return {"output": out, "lse": lse, "gradient": segment_attention.backward(grad, qkv, out, lse, offsets, scale)}


def expected(qkv: Tensor, grad: Tensor, offsets: list[int], scale: float) -> dict[str, Tensor]:
    qkv, grad = qkv.double(), grad.double()
    out, lse = segment_reference.forward(qkv, offsets, scale)
    return {"output": out, "lse": lse, "gradient": segment_reference.backward(grad, qkv, out, lse, offsets, scale)}


def exponents(lse: Tensor) -> Tensor:
    """What to compare of a log-sum-exp, whose absolute error is the relative one of what it stands for: beside ones, so
    that a single value near 0 isn't compared relative to itself."""
    return torch.stack([lse, torch.ones_like(lse)])


def check(qkv: Tensor, grad: Tensor, offsets: list[int], scale: float, tolerance: float = 1e-5) -> dict[str, Tensor]:
    actual = run(qkv, grad, offsets, scale)
    for name, tensor in expected(qkv, grad, offsets, scale).items():
        found, wanted = (exponents(t) if name == "lse" else t for t in (actual[name], tensor))
        assert_close(found, wanted, tolerance, name)
    assert actual["gradient"].stride() == torch.empty_like(qkv).stride()
    again = run(qkv, grad, offsets, scale)
    assert all(torch.equal(actual[name], again[name]) for name in actual), "differs on a second run"
    return actual


@pytest.mark.parametrize(("tokens", "width"), [*((n, 12) for n in LENGTHS), *((n, 64) for n in LENGTHS)])
def test_lengths(isa: str, tokens: int, width: int) -> None:
    check(by_head(tokens, 2, width), torch.randn(2, tokens, 2, width), [0, tokens], width**-0.5)


@pytest.mark.parametrize("width", [*WIDTHS, 1, 7])
def test_widths(isa: str, width: int) -> None:
    for tokens in (33, 77):
        check(by_head(tokens, 2, width), torch.randn(2, tokens, 2, width), [0, tokens], width**-0.5)


def test_unequal_segments(isa: str) -> None:
    for offsets in ([0, 35, 56, 71], [0, 1, 130, 131, 300], [0, 17, 34, 50]):
        check(by_head(offsets[-1], 3, 16), torch.randn(2, offsets[-1], 3, 16), offsets, 0.25)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "every second token": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "batch inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "width not dense": lambda t: t.transpose(-1, 1).contiguous().transpose(-1, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_memory_orders(isa: str, form: str) -> None:
    qkv, grad = by_head(35, 2, 16), torch.randn(2, 35, 2, 16)
    check(FORMS[form](qkv), FORMS[form](grad), [0, 35], 0.25)
    for stride_0 in (grad[:, :1].expand_as(grad), grad[:1, :1, :1, :1].expand_as(grad)):
        check(FORMS[form](qkv), stride_0, [0, 35], 0.25)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_any_scale(isa: str, scale: float) -> None:
    check(by_head(100, 1, 8), torch.randn(2, 100, 1, 8), [0, 100], scale)
    check(by_head(17, 1, 8), torch.randn(2, 17, 1, 8), [0, 17], scale)


def eager(qkv: Tensor, grad: Tensor, offsets: list[int], scale: float) -> dict[str, Tensor]:
    """Plain PyTorch in the tensors' own dtype, with a float32 softmax as in the release."""
    qkv = qkv.detach().requires_grad_()
    parts = []
    for start, stop in pairwise(offsets):
        q, k, v = qkv[:, start:stop].permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * scale @ k.mT).float().softmax(-1).to(q.dtype)
        parts.append((weights @ v).transpose(1, 2))
    out = torch.cat(parts, 1)
    return {"output": out.detach(), "gradient": torch.autograd.grad(out, qkv, grad)[0]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (17, 48), (77, 32), (130, 7)])
def test_16_bits(isa: str, dtype: torch.dtype, tokens: int, width: int) -> None:
    """The error is at most twice eager PyTorch's in the same dtype."""
    for offsets in ([0, tokens], [0, tokens // 3, tokens])[: 1 + (tokens > 2)]:
        inputs = by_head(tokens, 2, width).to(dtype), torch.randn(2, tokens, 2, width).to(dtype)
        actual, plain = run(*inputs, offsets, width**-0.5), eager(*inputs, offsets, width**-0.5)
        exact = expected(*inputs, offsets, width**-0.5)
        assert actual["output"].dtype == actual["gradient"].dtype == dtype
        assert_close(actual["lse"], exact["lse"], 1e-4, "lse")
        for name in plain:
            bound = max(2 * relative_error(plain[name], exact[name]), OPERATION[dtype])
            assert_close(actual[name], exact[name], bound, name)


@pytest.mark.parametrize("tokens", [17, 150])
def test_large_scores(isa: str, tokens: int) -> None:
    """Scores up to +-80: no overflow, no lost sums. Their own rounding (80 x 6e-8) sets the tolerance."""
    qkv, grad = by_head(tokens, 2, 16), torch.randn(2, tokens, 2, 16)
    scores = torch.einsum("bihc,bjhc->bhij", qkv[:, :, 0], qkv[:, :, 1])
    check(qkv, grad, [0, tokens], float(80 / scores.abs().max()), 1e-4)


@pytest.mark.parametrize("tokens", [17, 150])
@pytest.mark.parametrize("factor", [1e3, 1e4, 2e4, 3e4])
def test_huge_scores(isa: str, tokens: int, factor: float) -> None:
    """Scores up to 2e10, whose rounding is in the hundreds: a query takes the value of its best key, and nothing
    overflows."""
    qkv, grad = factor * by_head(tokens, 2, 16), torch.randn(2, tokens, 2, 16)
    actual, exact = run(qkv, grad, [0, tokens], 1.0), expected(qkv, grad, [0, tokens], 1.0)
    assert_close(actual["output"], exact["output"], 1e-5, "output")
    assert_close(actual["lse"], exact["lse"], 1e-5, "lse")
    assert torch.isfinite(actual["gradient"]).all()


def test_nan_is_passed_on(isa: str) -> None:
    for tokens in (17, 150):
        qkv = by_head(tokens, 2, 16)
        qkv[0, 5, 1, 1, 3] = float("nan")  # a key, so every query of its batch element and head
        out, lse = segment_attention.forward(qkv, [0, tokens], 0.25)
        assert out[0, :, 1].isnan().all()
        assert lse[0, 1].isnan().all()
        assert out[0, :, 0].isfinite().all()
        assert out[1].isfinite().all()


@pytest.mark.parametrize("offsets", [[0, 300], [0, 40, 260, 300]])
def test_threads(isa: str, offsets: list[int]) -> None:
    """Fewer problems than threads: threads share the blocks of a problem, and every run still gives the same
    bits."""
    qkv, grad = by_head(300, 1, 64, batch=1), torch.randn(1, 300, 1, 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            check(qkv, grad, offsets, 0.125)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 40), st.integers(1, 3))
def test_any_shape(segments: list[int], heads: int, width: int, batch: int) -> None:
    torch.manual_seed(0)  # the same numbers when Hypothesis comes back to a shape
    offsets = [sum(segments[:i]) for i in range(len(segments) + 1)]
    qkv = by_head(offsets[-1], heads, width, batch)
    check(qkv, torch.randn(batch, offsets[-1], heads, width), offsets, width**-0.5)


def tables(length: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(length, width)
    return angles.sin(), angles.cos()


def check_axial(
    qkv: Tensor, query: Tensor | None, rotation: tuple[Tensor, Tensor] | None, axis: str, bound: float = 1e-5
) -> None:
    scale = qkv.shape[-1] ** -0.5
    sin, cos = rotation or (None, None)
    wide = [None if t is None else t.double() for t in (qkv, query, sin, cos)]
    exact, exact_lse = axial_reference.forward(*wide, axis, scale)
    out, lse = axial_attention.forward(qkv, query, sin, cos, axis, scale)
    grad = torch.randn_like(exact).to(qkv.dtype)
    assert_close(out, exact, bound, "output")
    assert_close(lse, exact_lse, bound, "lse")
    gradients = axial_attention.backward(grad, qkv, query, sin, cos, out, lse, axis, scale)
    again = axial_attention.backward(grad, qkv, query, sin, cos, out, lse, axis, scale)
    exact_gradients = axial_reference.backward(grad.double(), *wide, exact, exact_lse, axis, scale)
    for name, a, e, b in zip(("qkv", "query"), gradients, exact_gradients, again, strict=True):
        if e.norm() > 1e-9:
            assert_close(a, e, bound, f"gradient of {name}")
        else:  # with one token there is no choice, so no gradient
            assert a.numel() == e.numel()
            assert (a.abs() < 100 * bound).all()
        assert torch.equal(a, b)
    assert gradients[0].stride() == torch.empty_like(qkv).stride()


AXIAL_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "time inside": lambda t: t.movedim(1, 3).contiguous().movedim(3, 1),
    "width before height": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("axis", ["time", "space"])
def test_axial(isa: str, axis: str) -> None:
    for sizes, width in (((5, 3, 7), 12), ((16, 2, 3), 64), ((17, 2, 2), 48), ((33, 1, 2), 8), ((2, 9, 11), 80)):
        length = sizes[0] if axis == "time" else sizes[1] * sizes[2]
        qkv = torch.randn(2, *sizes, 3, 2, width)
        for rotation in (None, tables(length, width)):
            check_axial(qkv, None, rotation, axis)
            check_axial(qkv.half(), None, rotation, axis, 1e-3)


def eager_axial(qkv: Tensor, sin: Tensor, cos: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient along space, all in qkv's dtype except the softmax."""
    qkv = qkv.detach().requires_grad_()
    q, k, v = axial_reference.to_sequences(qkv, "space").unbind(0)
    q, k = (x * cos.to(x) + axial_reference.rotate_pairs(x) * sin.to(x) for x in (q, k))
    weights = (q * qkv.shape[-1] ** -0.5 @ k.mT).float().softmax(-1).to(q.dtype)
    out = axial_reference.from_sequences(weights @ v, "space", *qkv.shape[2:4])
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


@pytest.mark.parametrize("width", [8, 64])
def test_axial_in_bfloat16(isa: str, width: int) -> None:
    """Long enough for bf16 products, with rotated queries and keys. The error is at most twice eager's."""
    qkv, grad = torch.randn(1, 2, 8, 9, 3, 2, width).bfloat16(), torch.randn(1, 2, 8, 9, 2, width).bfloat16()
    rotation, scale = tables(72, width), width**-0.5
    out, lse = axial_attention.forward(qkv, None, *rotation, "space", scale)
    gradient, _ = axial_attention.backward(grad, qkv, None, *rotation, out, lse, "space", scale)
    wide = qkv.double(), None, *(t.double() for t in rotation)
    exact = axial_reference.forward(*wide, "space", scale)
    exact_gradient, _ = axial_reference.backward(grad.double(), *wide, *exact, "space", scale)
    plain_out, plain_gradient = eager_axial(qkv, *rotation, grad)
    assert relative_error(out, exact[0]) < 2 * relative_error(plain_out, exact[0])
    assert relative_error(gradient, exact_gradient) < 2 * relative_error(plain_gradient, exact_gradient)


@pytest.mark.parametrize("form", AXIAL_FORMS)
def test_axial_memory_orders(isa: str, form: str) -> None:
    for axis, length in (("time", 5), ("space", 21)):
        check_axial(AXIAL_FORMS[form](torch.randn(2, 5, 3, 7, 3, 2, 12)), None, tables(length, 12), axis)
    qkv, query = torch.randn(2, 5, 3, 7, 2, 2, 12), torch.randn(2, 1, 3, 7, 2, 12)
    check_axial(AXIAL_FORMS[form](qkv), AXIAL_FORMS[form](query), None, "time")


@pytest.mark.parametrize(("length", "width"), [(1, 8), (9, 12), (17, 48), (33, 64), (200, 7)])
def test_single_query(isa: str, length: int, width: int) -> None:
    qkv, query = torch.randn(2, length, 2, 3, 2, 2, width), torch.randn(2, 1, 2, 3, 2, width)
    check_axial(qkv, query, None, "time")
    check_axial(qkv.half(), query.half(), None, "time", 1e-3)


def test_arguments_are_checked() -> None:
    qkv = by_head(6, 2, 8)
    with pytest.raises(ValueError, match="offsets must span"):
        segment_attention.forward(qkv, [0, 5], 1.0)
    with pytest.raises(ValueError, match="offsets must rise"):
        segment_attention.forward(qkv, [0, 4, 4, 6], 1.0)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        segment_attention.forward(qkv.double(), [0, 6], 1.0)
    lattice = torch.randn(1, 2, 3, 1, 3, 1, 8)
    with pytest.raises(ValueError, match="rotation table has not the shape"):
        axial_attention.forward(lattice, None, torch.ones(3, 8), torch.ones(3, 8), "time", 1.0)

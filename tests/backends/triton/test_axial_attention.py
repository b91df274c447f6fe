"""All three variants of `axial_attention` in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import assert_close, relative_error
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast import ops, use_backend
from pvdm_fast.backends.reference import axial_attention as reference

pytest.importorskip("triton", reason="needs Triton: pip install triton")
from pvdm_fast.kernels import axial_attention, axial_attention_short
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.launch import watch

Tables = tuple[Tensor, Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tables(length: int, width: int) -> Tables:
    """Each element has its own angle, as along time: kernels must not assume that a pair shares one."""
    angles = 3 * torch.randn(length, width)
    return angles.sin(), angles.cos()


def results(
    module: object, grad: Tensor, qkv: Tensor, query: Tensor | None, rotation: Tables | None, axis: str, scale: float
) -> dict[str, Tensor]:
    out, lse = module.forward(qkv, query, *(rotation or (None, None)), axis, scale)  # type: ignore[attr-defined]
    dqkv, dquery = module.backward(  # type: ignore[attr-defined]
        grad, qkv, query, *(rotation or (None, None)), out, lse, axis, scale
    )
    return {"output": out, "lse": lse, "gradient of qkv": dqkv, "gradient of query": dquery}


def doubled(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def eager(
    grad: Tensor, qkv: Tensor, query: Tensor | None, rotation: Tables | None, axis: str, scale: float
) -> dict[str, Tensor]:
    """Plain PyTorch in qkv's dtype, with a float32 softmax as in the release."""
    qkv = qkv.detach().requires_grad_()
    sequences = reference.to_sequences(qkv, axis).unbind(0)
    q, k, v = sequences if query is None else (reference.to_sequences(query, axis), *sequences)
    if rotation:
        sin, cos = rotation
        q, k = (x * cos.to(x) + reference.rotate_pairs(x) * sin.to(x) for x in (q, k))
    weights = (q * scale @ k.mT).float().softmax(-1).to(v.dtype)
    out = reference.from_sequences(weights @ v, axis, *qkv.shape[2:4])
    return {"output": out.detach(), "gradient of qkv": torch.autograd.grad(out, qkv, grad)[0]}


def check(
    qkv: Tensor,
    axis: str,
    query: Tensor | None = None,
    rotation: Tables | None = None,
    grad: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Forward and backward. In 16 bits the error is at most twice eager PyTorch's in the same dtype."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    shape = (*qkv.shape[:4], *qkv.shape[5:]) if query is None else query.shape
    grad = torch.randn(shape).to(qkv.dtype) if grad is None else grad
    actual = results(axial_attention, grad, qkv, query, rotation, axis, scale)
    wide_rotation = None if rotation is None else (rotation[0].double(), rotation[1].double())
    exact = results(reference, grad.double(), qkv.double(), doubled(query), wide_rotation, axis, scale)
    bounds = dict.fromkeys(exact, OPERATION[qkv.dtype])
    if qkv.dtype != torch.float32:
        for name, plain in eager(grad, qkv, query, rotation, axis, scale).items():
            bounds[name] = max(bounds[name], 2 * relative_error(plain, exact[name]))
    for name, tensor in actual.items():
        assert tensor.dtype == (torch.float32 if name == "lse" else qkv.dtype)
        if name == "lse" and qkv.dtype != torch.float32 and rotation is not None:
            # The error is that of the scores. Rotating in 16 bits rounds each factor by a unit in the last place.
            assert (tensor - exact[name]).abs().max() < 8 * torch.finfo(qkv.dtype).eps
        else:
            assert_close(tensor, exact[name], bounds[name], name)
    assert actual["gradient of qkv"].stride() == torch.empty_like(qkv).stride()


def lattice(
    sizes: tuple[int, int, int], parts: int, heads: int, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(2, *sizes, parts, heads, width).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("axis", ["time", "space"])
def test_small_lattice(axis: str, rotated: bool, dtype: torch.dtype) -> None:
    """Lengths 3 and 35: 21 sequences per tile with the last tile partial, and one sequence per tile."""
    qkv = lattice((3, 5, 7), 3, 3, 8, dtype)
    check(qkv, axis, rotation=tables(3 if axis == "time" else 35, 8) if rotated else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "width"), [(1, 8), (9, 48), (16, 64), (17, 48), (33, 48), (64, 16), (70, 24)])
def test_sequences(length: int, width: int, dtype: torch.dtype) -> None:
    """The projections' form, (S, L, 1, 1, 3, heads, d), without rotation. Long are 33 in float32, and 70 in all
    dtypes."""
    qkv = torch.randn(9 if length < 64 else 2, length, 1, 1, 3, 2, width).to(dtype)
    assert axial_attention_short.serves(length, width, dtype) == (
        length < 65 and (length, dtype) != (33, torch.float32)
    )
    check(qkv, "time")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "width"), [((2, 9, 17), 12), ((1, 12, 16), 64), ((1, 5, 13), 80)])
def test_large_frames(sizes: tuple[int, int, int], width: int, dtype: torch.dtype) -> None:
    """153, 192 and 65 tokens: several blocks of queries and keys, full and partial ones, and tiles wider than
    heads."""
    check(lattice(sizes, 3, 2, width, dtype)[:1], "space", rotation=tables(sizes[1] * sizes[2], width))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "width"), [(1, 8), (9, 48), (33, 64), (70, 12)])
def test_single_query(length: int, width: int, dtype: torch.dtype) -> None:
    qkv, query = lattice((length, 3, 5), 2, 3, width, dtype), torch.randn(2, 1, 3, 5, 3, width).to(dtype)
    if length > 1:
        check(qkv, "time", query)
    else:  # With one token there is no choice, so no gradient: it is zero except for rounding.
        out, lse = axial_attention.forward(qkv, query, None, None, "time", 0.5)
        assert torch.equal(out, qkv[:, :, :, :, 1])
        dqkv, dquery = axial_attention.backward(torch.ones_like(out), qkv, query, None, None, out, lse, "time", 0.5)
        assert_close(dqkv[:, :, :, :, 1], torch.ones_like(out), OPERATION[dtype])
        assert dquery.abs().max() < 100 * torch.finfo(torch.float32).eps
        assert dqkv[:, :, :, :, 0].abs().max() < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("width", "dtype"), [(130, torch.bfloat16), (256, torch.float32)])
def test_wide_heads(width: int, dtype: torch.dtype) -> None:
    check(lattice((5, 1, 3), 3, 1, width, dtype), "time", rotation=tables(5, width))
    check(lattice((1, 5, 14), 3, 1, width, dtype), "space", rotation=tables(70, width))
    check(lattice((5, 1, 3), 2, 1, width, dtype), "time", torch.randn(2, 1, 1, 3, 1, width).to(dtype))


def test_deterministic() -> None:
    """The same bits on a second run, of every variant."""
    for sizes, single in (((9, 3, 5), False), ((70, 1, 2), False), ((9, 3, 5), True)):
        qkv, grad = lattice(sizes, 2 if single else 3, 1, 16), torch.randn(2, *sizes, 1, 16)
        query = torch.randn(2, 1, *sizes[1:], 1, 16) if single else None
        arguments = (grad[:, :1] if single else grad, qkv, query, None, "time", 0.25)
        first, second = results(axial_attention, *arguments), results(axial_attention, *arguments)
        assert all(torch.equal(first[name], second[name]) for name in first)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "time inside": lambda t: t.movedim(1, 3).contiguous().movedim(3, 1),
    "width before height": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "heads outside": lambda t: t.movedim(-2, 0).contiguous().movedim(0, -2),
    "every second token": lambda t: t.repeat_interleave(2, dim=3)[:, :, :, ::2],
    "sliced": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("form", FORMS)
def test_memory_orders(form: str) -> None:
    """qkv, query and the incoming gradient in other orders, for every variant."""
    change = FORMS[form]
    qkv, grad = lattice((5, 3, 7), 3, 2, 12), torch.randn(2, 5, 3, 7, 2, 12)
    for axis, length in (("time", 5), ("space", 21)):
        check(change(qkv), axis, rotation=tables(length, 12), grad=change(grad))
    long = lattice((2, 7, 10), 3, 1, 12)
    check(change(long), "space", rotation=tables(70, 12), grad=change(torch.randn(2, 2, 7, 10, 1, 12)))
    query = torch.randn(2, 1, 3, 7, 2, 12)
    check(change(lattice((5, 3, 7), 2, 2, 12)), "time", change(query), grad=change(torch.randn(2, 1, 3, 7, 2, 12)))


@pytest.mark.parametrize("sizes", [(5, 3, 7), (70, 1, 2)])
def test_stride_0(sizes: tuple[int, int, int]) -> None:
    """Gradients of sums, and a frame repeated along time."""
    qkv, query = lattice(sizes, 3, 1, 8), torch.randn(2, 1, *sizes[1:], 1, 8)
    check(qkv, "time", grad=torch.ones(()).expand(2, *sizes, 1, 8))
    check(qkv, "time", grad=torch.randn(2, 1, 1, 1, 1, 8).expand(2, *sizes, 1, 8))
    check(qkv[:, :1].expand_as(qkv), "time", rotation=tables(sizes[0], 8))
    check(qkv[..., 1:, :, :], "time", query, grad=torch.ones(()).expand_as(query))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_any_scale(scale: float) -> None:
    for length in (9, 70):
        check(lattice((length, 1, 2), 3, 1, 8), "time", scale=scale, rotation=tables(length, 8))


@pytest.mark.parametrize("length", [17, 150])
def test_large_scores(length: int) -> None:
    """Scores up to +-80: no overflow, no lost sums. Their own rounding (80 x 6e-8) sets the tolerance."""
    qkv, grad = torch.randn(1, length, 1, 2, 3, 2, 16), torch.randn(1, length, 1, 2, 2, 16)
    scores = torch.einsum("bthwnc,bshwnc->bhwnts", qkv[:, :, :, :, 0], qkv[:, :, :, :, 1])
    scale = float(80 / scores.abs().max())
    query = qkv[:, :1, :, :, 0]
    for arguments in ((grad, qkv, None), (grad[:, :1], qkv[:, :, :, :, 1:], query)):
        actual = results(axial_attention, *arguments, None, "time", scale)
        exact = results(reference, *(doubled(t) for t in arguments), None, "time", scale)
        for name, tensor in actual.items():
            assert_close(tensor, exact[name], 1e-4, name)


def test_through_autograd() -> None:
    """The public function as the model calls it: qkv of one linear layer, viewed as a lattice."""
    x = torch.randn(2, 3 * 35, 3 * 16, requires_grad=True)
    with use_backend("triton"):
        out = ops.axial_attention(x.view(2, 3, 5, 7, 3, 2, 8), "space", tables(35, 8))
        out.square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("length", "rotated", "single", "launches"),
    [(16, True, False, (1, 1)), (17, False, True, (1, 1)), (1024, True, False, (2, 3)), (1024, False, False, (1, 2))],
)
def test_launches(length: int, rotated: bool, single: bool, launches: tuple[int, int]) -> None:
    """How many kernels are launched, on tensors without data."""
    seen: list[str] = []
    qkv = torch.empty(2, length, 4, 4, 2 if single else 3, 8, 64, dtype=torch.bfloat16, device="meta")
    query = torch.empty(2, 1, 4, 4, 8, 64, dtype=torch.bfloat16, device="meta") if single else None
    table = torch.empty(length, 64, device="meta") if rotated else None
    with assume("sm90"), watch(lambda kernel, *_: seen.append(kernel.__name__)):
        out, lse = axial_attention.forward(qkv, query, table, table, "time", 0.125)
        forward = len(seen)
        axial_attention.backward(out, qkv, query, table, table, out, lse, "time", 0.125)
    assert (forward, len(seen) - forward) == launches, seen

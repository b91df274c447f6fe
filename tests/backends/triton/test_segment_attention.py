"""`segment_attention` in Triton, in the interpreter, against the float64 reference."""

from __future__ import annotations

from itertools import pairwise

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import torch
from comparison import assert_close, relative_error
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast.backends.reference import segment_attention as reference
from pvdm_fast.kernels import segment_attention
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.launch import watch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_head(tokens: int, heads: int, width: int, batch: int = 2) -> Tensor:
    """(B, N, 3, heads, d) in the denoiser's memory order: each head's q, k, v in turn."""
    return torch.randn(batch, tokens, heads, 3, width).transpose(2, 3)


def run(qkv: Tensor, grad: Tensor, offsets: list[int], scale: float) -> dict[str, Tensor]:
    out, lse = segment_attention.forward(qkv, offsets, scale)
    return {"output": out, "lse": lse, "gradient": segment_attention.backward(grad, qkv, out, lse, offsets, scale)}


def expected(qkv: Tensor, grad: Tensor, offsets: list[int], scale: float) -> dict[str, Tensor]:
    qkv, grad = qkv.double(), grad.double()
    out, lse = reference.forward(qkv, offsets, scale)
    return {"output": out, "lse": lse, "gradient": reference.backward(grad, qkv, out, lse, offsets, scale)}


def check(qkv: Tensor, grad: Tensor, offsets: list[int], scale: float, tolerance: float = 1e-5) -> dict[str, Tensor]:
    before = qkv.clone(), grad.clone()
    actual = run(qkv, grad, offsets, scale)
    for name, tensor in expected(qkv, grad, offsets, scale).items():
        assert_close(actual[name], tensor, tolerance, name)
    assert actual["output"].is_contiguous()
    assert actual["gradient"].stride() == torch.empty_like(qkv).stride()
    assert torch.equal(qkv, before[0]) and torch.equal(grad, before[1])
    return actual


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


@pytest.mark.parametrize("width", [8, 16, 24, 32, 64, 80, 128, 256])
def test_widths(width: int) -> None:
    """One to three blocks on each axis, padded widths, and float32 scores summed whole and by chunks."""
    check(by_head(71, 1, width), torch.randn(2, 71, 1, width), [0, 71], width**-0.5)


@pytest.mark.parametrize("offsets", [[0, 1], [0, 35, 50, 71], [0, 1, 70, 71, 72, 90], [0, 64, 128], [0, 128, 192, 256]])
def test_segments(offsets: list[int]) -> None:
    """One token, unequal segments, more segments than one launch takes, and only full blocks (no masks)."""
    for width in (16, 40):
        check(by_head(offsets[-1], 1, width, batch=1), torch.randn(1, offsets[-1], 1, width), offsets, 0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(71, 32), (130, 80), (128, 128)])
def test_16_bits(dtype: torch.dtype, tokens: int, width: int) -> None:
    """The error is at most twice eager PyTorch's in the same dtype."""
    offsets, scale = [0, tokens // 2, tokens], width**-0.5
    inputs = by_head(tokens, 1, width).to(dtype), torch.randn(2, tokens, 1, width).to(dtype)
    actual, plain = run(*inputs, offsets, scale), eager(*inputs, offsets, scale)
    exact = expected(*inputs, offsets, scale)
    assert actual["output"].dtype == actual["gradient"].dtype == dtype
    assert_close(actual["lse"], exact["lse"], OPERATION[torch.float32], "lse")
    for name in plain:
        bound = max(2 * relative_error(plain[name], exact[name]), OPERATION[dtype])
        assert_close(actual[name], exact[name], bound, name)


def test_memory_orders() -> None:
    qkv, grad = by_head(35, 2, 16), torch.randn(2, 35, 2, 16)
    for change in (
        lambda t: t.contiguous(),
        lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(-1, 1).contiguous().transpose(-1, 1),
    ):
        check(change(qkv), change(grad), [0, 35], 0.25)


def test_stride_0_gradients() -> None:
    qkv, grad = by_head(35, 2, 16), torch.randn(2, 35, 2, 16)
    for stride_0 in (grad[:, :1].expand_as(grad), grad[:1, :1, :1, :1].expand_as(grad)):
        check(qkv, stride_0, [0, 35], 0.25)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
@pytest.mark.parametrize("width", [8, 64])
def test_any_scale(scale: float, width: int) -> None:
    check(by_head(70, 1, width, 1), torch.randn(1, 70, 1, width), [0, 70], scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_again(dtype: torch.dtype) -> None:
    inputs = by_head(71, 2, 64, 1).to(dtype), torch.randn(1, 71, 2, 64).to(dtype), [0, 35, 50, 71], 0.125
    first, second = run(*inputs), run(*inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # in rows of missing keys, which nobody stores
def test_scores_far_below_0() -> None:
    """A missing key scores 0, here e^400 times every real one. No kernel may count it."""
    qkv = torch.ones(1, 40, 1, 3, 16)
    qkv[..., 1, :] = -25
    qkv += 0.1 * torch.randn_like(qkv)
    check(qkv.transpose(2, 3), torch.randn(1, 40, 1, 16), [0, 40], 1.0, 1e-4)


def test_nan_is_passed_on() -> None:
    qkv = by_head(71, 2, 16)
    qkv[0, 5, 1, 1, 3] = float("nan")  # a key, so every query of its batch element and head
    out, lse = segment_attention.forward(qkv, [0, 71], 0.25)
    assert out[0, :, 1].isnan().all() and lse[0, 1].isnan().all()
    assert out[0, :, 0].isfinite().all() and out[1].isfinite().all()


def launches(qkv: Tensor, offsets: list[int]) -> list[str]:
    names: list[str] = []
    with watch(lambda kernel, *_: names.append(kernel.fn.__name__)), assume("sm90"):
        out, lse = segment_attention.forward(qkv, offsets, 0.25)
        segment_attention.backward(torch.empty_like(out), qkv, out, lse, offsets, 0.25)
    return names


def test_three_planes_in_one_launch() -> None:
    """One launch forward and two backward, for one segment and for three. Nothing reads the tensors' values."""
    qkv = torch.empty(2, 2048, 8, 3, 32, dtype=torch.bfloat16, device="meta").transpose(2, 3)
    once = ["segment_attention_forward", "segment_attention_backward_dq", "segment_attention_backward_dkdv"]
    assert launches(qkv, [0, 2048]) == launches(qkv, [0, 1024, 1536, 2048]) == once

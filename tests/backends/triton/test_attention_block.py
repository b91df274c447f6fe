"""`attention_block` in Triton's interpreter, against the float64 reference, and where the denoiser uses it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import torch
from comparison import assert_close, relative_error
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast import ops, use_backend
from pvdm_fast.backends import choice
from pvdm_fast.backends.reference import attention_block as reference
from pvdm_fast.kernels import attention_block
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.launch import watch
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.nn import PlaneAttention, TriplaneAttention

operation = sys.modules["pvdm_fast.ops.attention_block"]  # `ops.attention_block` is the function


def inputs(batch: int, tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((3 * channels, channels), (3 * channels,), (channels, channels), (channels,))
    x = 3 + torch.randn(batch, tokens, channels)
    norm = [1 + 0.2 * torch.randn(channels), torch.randn(channels)]
    weights = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    return [t.to(dtype) for t in (x, *norm, *weights)]


@pytest.mark.parametrize(
    ("batch", "planes", "channels", "heads", "groups"),
    [
        (1, (128, 1), 64, 4, 32),  # groups of 2 channels, 16 at a time
        (2, (71, 1), 96, 2, 32),  # groups of 3, padded to 4
        (2, (1, 1), 64, 1, 4),
        (1, (33, 1), 144, 3, 2),  # a group wider than a step, and outputs and channels that don't fill blocks
        (2, (131, 1), 96, 2, 32),  # more tokens than one program holds
        (2, (5, 7, 3, 7, 3, 5), 96, 3, 32),  # inside planes
    ],
)
def test_float32(batch: int, planes: tuple[int, ...], channels: int, heads: int, groups: int) -> None:
    tokens = PlaneLayout.from_sizes(planes).num_tokens
    arguments = inputs(batch, tokens, channels)
    exact = reference.forward(*(t.double() for t in arguments), heads, groups, 1e-5, planes)
    before = [t.clone() for t in arguments]
    x = arguments[0]
    buffer = torch.full((batch, tokens, 2, channels), float("nan"))
    buffer[:, :, 1] = x
    for form in (x, x.transpose(1, 2).contiguous().transpose(1, 2), buffer[:, :, 1]):
        out = attention_block.forward(form, *arguments[1:], heads, groups, 1e-5, planes)
        assert out.is_contiguous()
        assert_close(out, exact, OPERATION[torch.float32])
    assert all(torch.equal(t, b) for t, b in zip(arguments, before, strict=True))


@torch.no_grad()
def test_the_block_is_fused_where_the_kernel_serves_its_sizes() -> None:
    """Heads of up to 256 channels, norms' groups of up to 128: wider ones go through the separate operations."""
    x, weight = torch.empty(1, 4, 576), torch.empty(1728, 576)
    with use_backend("triton"):
        assert ops.fuses_attention_block(x, weight, heads=4)
        assert not ops.fuses_attention_block(x, weight, heads=2)
        assert not ops.fuses_attention_block(x, weight, heads=4, groups=4)
        block = TriplaneAttention(576, num_heads=2)
        assert block._attend_fused(x, PlaneLayout(((4, 1),))) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    """What is added to x has at most twice the error of plain PyTorch in the same dtype."""
    arguments = inputs(2, 50, 64, dtype)
    arguments[0] = arguments[0] - 3  # a small residual, so that the comparison sees the block itself
    exact = reference.forward(*(t.double() for t in arguments), 2, 32, 1e-5, (50, 1))
    out = attention_block.forward(*arguments, 2, 32, 1e-5, (50, 1))
    x, gain, shift, qkv_weight, qkv_bias, weight, bias = arguments
    normed = torch.nn.functional.group_norm(x.transpose(1, 2), 32, gain, shift).transpose(1, 2)
    q, k, v = torch.nn.functional.linear(normed, qkv_weight, qkv_bias).view(2, 50, 2, 3, 32).permute(3, 0, 2, 1, 4)
    attended = ((q * 32**-0.5) @ k.mT).float().softmax(-1).to(dtype) @ v
    plain = x + torch.nn.functional.linear(attended.transpose(1, 2).flatten(2), weight, bias)
    assert out.dtype == dtype
    assert_close(out, exact, max(2 * relative_error(plain, exact), OPERATION[dtype]))
    assert torch.equal(out, attention_block.forward(*arguments, 2, 32, 1e-5, (50, 1)))


@pytest.mark.parametrize("planes", [(128, 1), (129, 1), (8, 8, 4, 8, 4, 8)])
def test_launches(planes: tuple[int, ...]) -> None:
    """Few tokens across planes: three. Otherwise one more, which is the vendor's product for qkv."""
    names: list[str] = []
    arguments = [t.to("meta") for t in inputs(1, PlaneLayout.from_sizes(planes).num_tokens, 64)]
    with watch(lambda kernel, *_: names.append(kernel.fn.__name__)), assume("sm90"):
        attention_block.forward(*arguments, 8, 32, 1e-5, planes)
    first = "attention_block_forward_qkv" if planes == (128, 1) else "plane_norm_forward_apply"
    assert names == [first, "segment_attention_forward", "attention_block_forward_projection"]


def block(kind: type[TriplaneAttention] = TriplaneAttention) -> TriplaneAttention:
    made = kind(64, 4)
    torch.nn.init.normal_(made.proj_out.weight, std=0.1)
    torch.nn.init.normal_(made.proj_out.bias)  # type: ignore[arg-type]
    torch.nn.init.normal_(made.norm.weight)
    return made


def calls_of_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    forward = attention_block.forward
    monkeypatch.setattr(attention_block, "forward", lambda *a: calls.append(a) or forward(*a))
    return calls


def test_denoiser_block_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, attention = calls_of_the_fused_kernel(monkeypatch), block()
    x = torch.randn(2, 64, 21)
    with torch.no_grad():
        with use_backend("reference"):
            expected = attention(x)
        with use_backend("triton"):
            assert_close(attention(x), expected, OPERATION[torch.float32])
            compiled = torch.compile(attention.forward_tokens, fullgraph=True, backend="aot_eager")
            assert_close(compiled(x.transpose(1, 2)).transpose(1, 2), expected, OPERATION[torch.float32])
    assert len(calls) == 1, "torch.compile fuses by itself"


@torch.no_grad()
def test_attention_inside_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, attention, layout = (
        calls_of_the_fused_kernel(monkeypatch),
        block(PlaneAttention),
        PlaneLayout(((3, 5), (2, 3))),
    )
    x = torch.randn(2, layout.num_tokens, 64)
    with use_backend("reference"):
        expected = attention(x, layout)
    with use_backend("triton"):
        assert_close(attention(x, layout), expected, OPERATION[torch.float32])
    assert len(calls) == 1


@pytest.mark.parametrize("why", ["gradient", "clips", "tokens", "autocast", "backend", "attention"])
def test_when_it_is_not_used(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """ "attention": of many tokens, where another backend's attention goes first."""
    calls, attention = calls_of_the_fused_kernel(monkeypatch), block()
    if why == "tokens":
        monkeypatch.setattr(operation, "MOST_TOKENS", 7)
    if why == "attention":
        monkeypatch.setattr(operation, "FEW_TOKENS", 7)
        serves = choice.serves
        monkeypatch.setattr(choice, "serves", lambda b, op, *rest: op != "segment_attention" and serves(b, op, *rest))
    x = torch.randn(3 if why == "clips" else 1, 8, 64)
    with (
        use_backend("auto" if why == "backend" else "triton"),
        torch.set_grad_enabled(why == "gradient"),
        torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"),
    ):
        attention.forward_tokens(x)
    assert not calls


def test_errors() -> None:
    arguments = inputs(1, 4, 64)
    with pytest.raises(ValueError, match="N up to 2048"):
        ops.attention_block(torch.randn(1, 2049, 64), *arguments[1:], heads=4)
    with pytest.raises(ValueError, match="has 4 tokens"):
        ops.attention_block(*arguments, heads=4, layout=PlaneLayout(((2, 3),)))
    with pytest.raises(ValueError, match="must divide the 64 channels"):
        ops.attention_block(*arguments, heads=5)
    with pytest.raises(ValueError, match="weights must have shapes"):
        ops.attention_block(*arguments[:-1], torch.zeros(3), heads=4)
    with pytest.raises(ValueError, match=r"weights must be torch\.bfloat16"):
        ops.attention_block(arguments[0].bfloat16(), *arguments[1:], heads=4)

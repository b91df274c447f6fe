"""`space_attention_heads` in Triton's interpreter, against the float64 reference. Layers: see test_fused_layer.py."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import torch
import torch.nn.functional as F
from comparison import assert_close, relative_error
from tolerances import BFLOAT16_FACTOR, OPERATION
from torch import Tensor

from pvdm_fast import ops, use_backend
from pvdm_fast.backends.reference import space_attention_heads as reference
from pvdm_fast.kernels import axial_attention_long, space_attention_heads
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.launch import Config, watch
from pvdm_fast.nn.axial_transformer import space_rotation
from pvdm_fast.ops import fusing

rule = import_module("pvdm_fast.ops.space_attention_heads")  # the package has a function of that name


def inputs(
    lattice: tuple[int, int, int], c: int, heads: int, head: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The tensors of the operation for `lattice` (B, T, sites). The tables are those of the autoencoder."""
    (batch, time, sites), inner = lattice, heads * head
    norm = [1 + 0.2 * torch.randn(c), torch.randn(c)]
    # Wide enough scores that the softmax prefers some tokens.
    tensors = (torch.randn(batch, time * sites, c), *norm, 2 * torch.randn(3 * inner, c) / c**0.5)
    return [*(t.to(dtype) for t in tensors), *space_rotation(sites, 1, head)]


def exact(tensors: list[Tensor], sites: int, heads: int) -> Tensor:
    return reference.forward(*(t.double() for t in tensors), sites, heads, 1e-5)


def layers(tensors: list[Tensor], sites: int, heads: int) -> Tensor:
    """The same step by step in the dtype of the tensors, as networks compute it without the kernel."""
    x, gain, shift, qkv_weight, sin, cos = tensors
    qkv = F.linear(F.layer_norm(x, gain.shape, gain, shift), qkv_weight)
    with use_backend("reference"):
        lattice = qkv.unflatten(1, (-1, sites, 1)).unflatten(-1, (3, heads, -1))
        return ops.axial_attention(lattice, "space", (sin, cos)).reshape(*x.shape[:2], -1)


SIZES = [
    ((1, 2, 1), 8, 1, 4),  # frames of one token
    ((2, 3, 35), 24, 3, 12),  # tiles of both clips and several frames, a rest of a tile
    ((1, 2, 150), 72, 2, 64),  # several blocks of queries and of keys
    ((2, 1, 128), 40, 8, 20),  # whole blocks of keys, heads that no step of a product ends with
    ((1, 3, 70), 512, 3, 28),  # several steps of both products
]


@pytest.mark.parametrize(("lattice", "c", "heads", "head"), SIZES)
def test_float32(lattice: tuple[int, int, int], c: int, heads: int, head: int) -> None:
    tensors, sizes = inputs(lattice, c, heads, head), (lattice[2], heads)
    before = [t.clone() for t in tensors]
    out = space_attention_heads.forward(*tensors, *sizes, 1e-5)
    assert out.is_contiguous()
    assert_close(out, exact(tensors, *sizes), OPERATION[torch.float32])
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert torch.equal(out, space_attention_heads.forward(*tensors, *sizes, 1e-5))


@pytest.mark.parametrize("blocks", [(64, 32, 16), (32, 128, 64)])
def test_steps_that_sizes_do_not_divide(monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, ...]) -> None:
    sizes = dict(zip(("ROWS", "OUTPUTS", "CHANNELS"), blocks, strict=True))
    monkeypatch.setattr(space_attention_heads, "KEYS_VALUES", lambda *_: Config(sizes))
    monkeypatch.setattr(axial_attention_long, "FORWARD", lambda *_: axial_attention_long.blocks(*blocks[:2], 4, 2))
    tensors = inputs((2, 3, 45), 40, 7, 20)
    assert_close(space_attention_heads.forward(*tensors, 45, 7, 1e-5), exact(tensors, 45, 7), OPERATION[torch.float32])


def test_strides() -> None:
    tensors = inputs((2, 3, 5), 24, 2, 8)
    expected = space_attention_heads.forward(*tensors, 5, 2, 1e-5)
    wide = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    wide[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(space_attention_heads.forward(*wide, 5, 2, 1e-5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    """At most twice the error of the layers one by one."""
    tensors = inputs((2, 2, 70), 64, 3, 16, dtype)
    out, wanted = space_attention_heads.forward(*tensors, 70, 3, 1e-5), exact(tensors, 70, 3)
    assert out.dtype == dtype
    allowed = BFLOAT16_FACTOR * relative_error(layers(tensors, 70, 3), wanted) + OPERATION[dtype]
    assert relative_error(out, wanted) <= allowed


def test_rows_of_great_mean() -> None:
    """The variance is summed around the mean."""
    tensors = inputs((1, 2, 20), 48, 2, 8)
    tensors[0] += 1000
    out = space_attention_heads.forward(*tensors, 20, 2, 1e-5)
    assert relative_error(out, exact(tensors, 20, 2)) < 1e-3  # x itself is rounded to 3e-5


def test_other_frames_do_not_see_a_nan() -> None:
    tensors = inputs((1, 3, 20), 24, 2, 8)
    expected = space_attention_heads.forward(*tensors, 20, 2, 1e-5)
    tensors[0][0, 25] = float("nan")
    out = space_attention_heads.forward(*tensors, 20, 2, 1e-5)
    assert out[:, 20:40].isnan().all()
    assert torch.equal(out[:, :20], expected[:, :20]) and torch.equal(out[:, 40:], expected[:, 40:])


def test_what_is_written() -> None:
    """Keys and values, two statistics a row, and the result: no normed rows, and no queries."""
    launched: list[tuple[str, tuple[int, ...], int]] = []

    def watcher(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], *_: Any) -> None:
        launched.append((kernel.fn.__name__, grid, sum(a.nbytes for a in arguments[6:] if isinstance(a, Tensor))))

    tensors = [t.to("meta") for t in inputs((1, 1, 1024), 384, 8, 64, torch.bfloat16)]
    with watch(watcher), assume("sm90"):
        space_attention_heads.forward(tensors[0].repeat(1, 16, 1), *tensors[1:], 1024, 8, 1e-5)
    first = 16384 * (2 * 2 * 512 + 2 * 4)
    assert launched == [
        ("space_attention_heads_keys_values", (128, 2), first),
        ("space_attention_heads_forward", (16 * 8 * 8,), first + 16384 * 2 * 512),
    ]


@torch.no_grad()
def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *weights = inputs((1, 2, 64), 24, 2, 8)[:4]
    with use_backend("triton"):
        assert not ops.fuses_space_attention_heads(x, 64, 2)
        monkeypatch.setattr(fusing, "LEAST_TOKENS", 128)
        assert ops.fuses_space_attention_heads(x, 64, 2)
        assert ops.fuses_space_attention_heads(x, 64, 2, tuple(weights))
        assert not ops.fuses_space_attention_heads(x, 63, 2, tuple(weights))
        assert not ops.fuses_space_attention_heads(x, 64, 2, (*weights[:-1], weights[-1].half()))
        for heads, head in ((1, 68), (261, 64)):  # too wide is the head, or all of them
            wide = tuple(inputs((1, 1, 1), 1, heads, head)[1:4])
            assert not ops.fuses_space_attention_heads(x, 64, heads, wide)


def test_errors() -> None:
    x, *weights, sin, cos = inputs((1, 4, 3), 24, 2, 8)
    sizes = dict(sites=3, heads=2)
    with pytest.raises(ValueError, match="x must be"):
        ops.space_attention_heads(x, *weights, sin, cos, sites=5, heads=2)
    with pytest.raises(ValueError, match="even multiple of 3 heads"):
        ops.space_attention_heads(x, *weights, sin, cos, sites=3, heads=3)
    with pytest.raises(ValueError, match=r"norm_bias must be \(24,\)"):
        ops.space_attention_heads(x, weights[0], weights[1][:3], weights[2], sin, cos, **sizes)
    with pytest.raises(ValueError, match=r"norm_weight must be torch\.bfloat16"):
        ops.space_attention_heads(x.bfloat16(), *weights, sin, cos, **sizes)
    with pytest.raises(ValueError, match=r"cos must be \(3, 8\)"):
        ops.space_attention_heads(x, *weights, sin, cos[:2], **sizes)
    with pytest.raises(ValueError, match=r"sin must be torch\.float32"):
        ops.space_attention_heads(x, *weights, sin.double(), cos, **sizes)

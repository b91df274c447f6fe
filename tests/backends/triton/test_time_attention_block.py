"""`time_attention_block` in Triton's interpreter, against the float64 reference. Layers: see test_fused_layer.py."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import torch
import torch.nn.functional as F
from comparison import assert_close, relative_error
from tolerances import BFLOAT16_FACTOR, OPERATION
from torch import Tensor

from pvdm_fast import ops, use_backend
from pvdm_fast.backends.reference import time_attention_block as reference
from pvdm_fast.kernels import time_attention_block
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.launch import Config, watch
from pvdm_fast.nn.axial_transformer import time_rotation
from pvdm_fast.ops import fusing


def inputs(
    lattice: tuple[int, int, int], c: int, heads: int, head: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The tensors of the operation for `lattice` (B, T, sites). The tables are those of the autoencoder."""
    (batch, time, sites), inner = lattice, heads * head
    norm = [1 + 0.2 * torch.randn(c), torch.randn(c)]
    # Wide enough scores that the softmax prefers some tokens.
    qkv, out = 2 * torch.randn(3 * inner, c) / c**0.5, torch.randn(c, inner) / inner**0.5
    tensors = (torch.randn(batch, time * sites, c), *norm, qkv, out, torch.randn(c))
    return [*(t.to(dtype) for t in tensors), *time_rotation(time, head)]


def exact(tensors: list[Tensor], time: int, heads: int) -> Tensor:
    return reference.forward(*(t.double() for t in tensors), time, heads, 1e-5)


def layers(tensors: list[Tensor], time: int, heads: int) -> Tensor:
    """The same step by step in the dtype of the tensors, as networks compute it without the kernel."""
    x, gain, shift, qkv_weight, out_weight, out_bias, *tables = tensors
    qkv = F.linear(F.layer_norm(x, gain.shape, gain, shift), qkv_weight)
    with use_backend("reference"):
        attended = ops.axial_attention(
            qkv.unflatten(1, (time, -1, 1)).unflatten(-1, (3, heads, -1)), "time", (tables[0], tables[1])
        )
    return x + F.linear(attended.reshape(*x.shape[:2], -1), out_weight, out_bias)


SIZES = [
    ((1, 2, 1), 8, 1, 4),  # the smallest
    ((1, 1, 5), 8, 2, 4),  # sequences of one token
    ((2, 3, 35), 24, 3, 12),  # tiles of both clips, a rest of a tile, heads of which several fit a step
    ((1, 16, 33), 72, 2, 64),  # more tiles than programs
    ((2, 9, 15), 40, 8, 20),  # the last heads are fewer
    ((1, 33, 7), 512, 1, 100),  # a tile of one sequence, a head that takes several steps
    ((1, 64, 3), 16, 5, 8),  # the longest
]


@pytest.mark.parametrize(("lattice", "c", "heads", "head"), SIZES)
def test_float32(lattice: tuple[int, int, int], c: int, heads: int, head: int) -> None:
    tensors, sizes = inputs(lattice, c, heads, head), (lattice[1], heads)
    before = [t.clone() for t in tensors]
    out = time_attention_block.forward(*tensors, *sizes, 1e-5)
    assert out.is_contiguous()
    assert_close(out, exact(tensors, *sizes), OPERATION[torch.float32])
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert torch.equal(out, time_attention_block.forward(*tensors, *sizes, 1e-5))


@pytest.mark.parametrize("blocks", [(64, 32, 16), (128, 128, 64)])
def test_steps_that_sizes_do_not_divide(monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, ...]) -> None:
    sizes = dict(zip(("ROWS", "OUTPUTS", "CHANNELS"), blocks, strict=True))
    monkeypatch.setattr(time_attention_block, "FORWARD", lambda *_: Config({**sizes, "PROGRAMS": 2}))
    tensors = inputs((2, 5, 27), 40, 7, 20)
    assert_close(time_attention_block.forward(*tensors, 5, 7, 1e-5), exact(tensors, 5, 7), OPERATION[torch.float32])


def test_strides() -> None:
    tensors = inputs((2, 7, 5), 24, 2, 8)
    expected = time_attention_block.forward(*tensors, 7, 2, 1e-5)
    wide = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    wide[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(time_attention_block.forward(*wide, 7, 2, 1e-5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    """At most twice the error of the layers one by one."""
    tensors = inputs((2, 9, 11), 64, 3, 16, dtype)
    out, wanted = time_attention_block.forward(*tensors, 9, 3, 1e-5), exact(tensors, 9, 3)
    assert out.dtype == dtype
    allowed = BFLOAT16_FACTOR * relative_error(layers(tensors, 9, 3), wanted) + OPERATION[dtype]
    assert relative_error(out, wanted) <= allowed


def test_rows_of_great_mean() -> None:
    """The variance is summed around the mean."""
    tensors = inputs((1, 4, 6), 48, 2, 8)
    tensors[0] += 1000
    out, wanted = time_attention_block.forward(*tensors, 4, 2, 1e-5), exact(tensors, 4, 2)
    assert relative_error(out - tensors[0], wanted - tensors[0]) < 1e-3  # x itself is rounded to 3e-5


def test_one_launch() -> None:
    """Whose memory is that of the programs that run at the same time, however many clips there are."""
    launched: list[tuple[str, tuple[int, ...], int]] = []

    def watcher(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], *_: Any) -> None:
        launched.append((kernel.fn.__name__, grid, sum(a.nbytes for a in arguments[8:10])))

    tensors = [t.to("meta") for t in inputs((1, 16, 1), 384, 8, 64, torch.bfloat16)]
    for batch in (1, 32):
        x = tensors[0][:, :1].expand(batch, 16384, -1)
        with watch(watcher), assume("sm90"):
            time_attention_block.forward(x, *tensors[1:], 16, 8, 1e-5)
    rows = 128 * 2 * (3 * 64 + 512)
    assert launched == 2 * [("time_attention_block_forward", (128,), 128 * rows)]  # 1 tile and 32 for each


@torch.no_grad()
def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *weights = inputs((1, 4, 1), 24, 2, 8)[:6]
    with use_backend("triton"):
        assert not ops.fuses_time_attention_block(x, 4)
        monkeypatch.setattr(fusing, "LEAST_TOKENS", 4)
        assert ops.fuses_time_attention_block(x, 4)
        assert ops.fuses_time_attention_block(x, 4, tuple(weights))
        assert not ops.fuses_time_attention_block(x, time_attention_block.LONGEST + 1, tuple(weights))
        assert not ops.fuses_time_attention_block(x, 4, (*weights[:-1], weights[-1].half()))
        wide = inputs((1, 4, 1), 1, 1, time_attention_block.WIDEST + 2)[1:6]
        assert not ops.fuses_time_attention_block(x, 4, tuple(wide))


def test_errors() -> None:
    x, *weights, sin, cos = inputs((1, 4, 3), 24, 2, 8)
    sizes = dict(time=4, heads=2)
    with pytest.raises(ValueError, match="x must be"):
        ops.time_attention_block(x, *weights, sin, cos, time=5, heads=2)
    with pytest.raises(ValueError, match="even multiple of 3 heads"):
        ops.time_attention_block(x, *weights, sin, cos, time=4, heads=3)
    with pytest.raises(ValueError, match="weights must have shapes"):
        ops.time_attention_block(x, weights[0], weights[1][:3], *weights[2:], sin, cos, **sizes)
    with pytest.raises(ValueError, match=r"weights must be torch\.bfloat16"):
        ops.time_attention_block(x.bfloat16(), *weights, sin, cos, **sizes)
    with pytest.raises(ValueError, match=r"cos must be \(4, 8\)"):
        ops.time_attention_block(x, *weights, sin, cos[:3], **sizes)
    with pytest.raises(ValueError, match=r"sin must be torch\.float32"):
        ops.time_attention_block(x, *weights, sin.double(), cos, **sizes)

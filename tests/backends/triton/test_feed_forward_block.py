"""`feed_forward_block` in Triton's interpreter, against the float64 reference. Layers: see test_fused_layer.py."""

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
from pvdm_fast.backends.reference import feed_forward_block as reference
from pvdm_fast.kernels import configs, feed_forward_block
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.launch import Config, watch
from pvdm_fast.ops import fusing


def inputs(
    batch: int, tokens: int, c: int, inner: int, hidden: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    def linear(inputs: int, outputs: int) -> list[Tensor]:
        return [torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)]

    norm = [1 + 0.2 * torch.randn(c), torch.randn(c)]
    tokens_ = [torch.randn(batch, tokens, c), torch.randn(batch, tokens, inner)]
    return [t.to(dtype) for t in (*tokens_, *linear(inner, c), *norm, *linear(c, 2 * hidden), *linear(hidden, c))]


def exact(arguments: list[Tensor]) -> Tensor:
    return reference.forward(*(t.double() for t in arguments), 1e-5)


def layers(arguments: list[Tensor]) -> Tensor:
    """The same step by step in the dtype of the arguments, as networks compute it without the kernel."""
    x, attended, *weights = arguments
    out, out_bias, gain, shift, up, up_bias, down, down_bias = weights
    total = x + F.linear(attended, out, out_bias)
    value, gate = F.linear(F.layer_norm(total, gain.shape, gain, shift), up, up_bias).chunk(2, -1)
    return total + F.linear(value * F.gelu(gate), down, down_bias)


SIZES = [
    (1, 1, 8, 4, 3),  # the smallest
    (2, 33, 24, 40, 129),  # tiles of both clips, a rest of the hidden layer
    (1, 200, 72, 16, 288),  # more tiles than programs
    (3, 64, 512, 136, 20),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_float32(sizes: tuple[int, ...]) -> None:
    arguments = inputs(*sizes)
    before = [t.clone() for t in arguments]
    out = feed_forward_block.forward(*arguments, 1e-5)
    assert out.is_contiguous()
    assert_close(out, exact(arguments), OPERATION[torch.float32])
    assert all(torch.equal(t, b) for t, b in zip(arguments, before, strict=True))
    assert torch.equal(out, feed_forward_block.forward(*arguments, 1e-5))


@pytest.mark.parametrize("blocks", [(64, 32, 16, 64), (128, 64, 64, 32)])
def test_steps_that_sizes_do_not_divide(monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, ...]) -> None:
    sizes = dict(zip(("ROWS", "OUTPUTS", "CHANNELS", "PART"), blocks, strict=True))
    monkeypatch.setattr(feed_forward_block, "FORWARD", lambda *_: Config({**sizes, "PROGRAMS": 2}))
    arguments = inputs(1, 135, 40, 50, 100)
    assert_close(feed_forward_block.forward(*arguments, 1e-5), exact(arguments), OPERATION[torch.float32])


def test_strides() -> None:
    arguments = inputs(2, 35, 24, 40, 33)
    expected = feed_forward_block.forward(*arguments, 1e-5)
    wide = [t.repeat_interleave(2, -1)[..., ::2] for t in arguments]
    wide[0] = arguments[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(feed_forward_block.forward(*wide, 1e-5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    """At most twice the error of the layers one by one."""
    arguments = inputs(2, 50, 64, 48, 160, dtype)
    out, wanted = feed_forward_block.forward(*arguments, 1e-5), exact(arguments)
    assert out.dtype == dtype
    allowed = BFLOAT16_FACTOR * relative_error(layers(arguments), wanted) + OPERATION[dtype]
    assert relative_error(out, wanted) <= allowed


def test_one_launch() -> None:
    """Whose memory is that of the programs that run at the same time, however many clips there are."""
    launched: list[tuple[str, tuple[int, ...], int]] = []

    def watcher(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], *_: Any) -> None:
        launched.append((kernel.fn.__name__, grid, sum(a.nbytes for a in arguments[10:12])))

    for batch in (1, 32):
        arguments = [t.to("meta") for t in inputs(batch, 16, 384, 512, 1536, torch.bfloat16)]
        x, attended = (t[:, :1].expand(-1, 16384, -1) for t in arguments[:2])
        with watch(watcher), assume("sm90"):
            feed_forward_block.forward(x, attended, *arguments[2:], 1e-5)
    rows = 128 * (4 * 384 + 2 * 512)
    assert launched == 2 * [("feed_forward_block_forward", (128,), 128 * rows)]  # 1 tile and 32 for each


@torch.no_grad()
def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, *weights = inputs(1, 4, 24, 16, 40)
    with use_backend("triton"):
        assert not ops.fuses_feed_forward_block(x)
        monkeypatch.setattr(fusing, "LEAST_TOKENS", 4)
        assert ops.fuses_feed_forward_block(x)
        assert ops.fuses_feed_forward_block(x, tuple(weights))
        assert not ops.fuses_feed_forward_block(x, (*weights[:-1], weights[-1].half()))
        assert not ops.fuses_feed_forward_block(x, tuple(inputs(1, 1, 1, 1, feed_forward_block.WIDEST + 1)[2:]))


def test_parts_are_whole_steps() -> None:
    """So that what `_widen` writes lies inside a row of `wide`."""
    table = configs.TABLES["feed_forward_block"]
    for config in (*table.entries.values(), *table.candidates):
        assert config.blocks["PART"] % (config.blocks["OUTPUTS"] // 2) == 0


def test_errors() -> None:
    x, attended, *weights = inputs(1, 4, 24, 16, 40)
    with pytest.raises(ValueError, match="x must be"):
        ops.feed_forward_block(x[0], attended, *weights)
    with pytest.raises(ValueError, match="down_weight must be"):
        ops.feed_forward_block(x, attended, *weights[:6], weights[6][0], weights[7])
    with pytest.raises(ValueError, match="weights must have shapes"):
        ops.feed_forward_block(x, attended[:, :3], *weights)
    with pytest.raises(ValueError, match=r"weights must be torch\.bfloat16"):
        ops.feed_forward_block(x.bfloat16(), attended, *weights)

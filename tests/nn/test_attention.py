"""TriplaneAttention as users meet it: three forms of input, any plane sizes, clear refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast import TriplaneAttention, TriplaneLayout

LAYOUT = TriplaneLayout(3, 5, 7)


@pytest.fixture
def block() -> TriplaneAttention:
    block = TriplaneAttention(64, num_heads=4)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block


def plain(block: TriplaneAttention, x: Tensor) -> Tensor:
    """The formula with PyTorch's own modules. x: (B, C, N)."""
    batch, channels, tokens = x.shape
    normed = F.group_norm(x, 32, block.norm.weight, block.norm.bias)
    qkv = block.qkv(normed).reshape(batch * block.num_heads, -1, tokens)
    q, k, v = qkv.chunk(3, dim=1)
    weights = (q.mT @ k / (channels // block.num_heads) ** 0.5).softmax(-1)
    return x + block.proj_out((v @ weights.mT).reshape(batch, channels, tokens))


def test_packed(block: TriplaneAttention) -> None:
    x = torch.randn(2, 64, LAYOUT.num_tokens)
    y = block(x)
    assert y.is_contiguous()
    assert_close(y, plain(block, x), OPERATION[torch.float32])


def test_three_forms_agree(block: TriplaneAttention) -> None:
    x = torch.randn(2, 64, LAYOUT.num_tokens)
    packed = block(x)
    planes = block(LAYOUT.split(x, dim=2))
    assert [tuple(p.shape) for p in planes] == [(2, 64, *plane) for plane in LAYOUT.planes]
    assert torch.equal(torch.cat([p.flatten(2) for p in planes], dim=2), packed)
    assert torch.equal(block.forward_tokens(x.transpose(1, 2)).transpose(1, 2), packed)


def test_any_three_sizes(block: TriplaneAttention) -> None:
    """Sizes that belong to no lattice."""
    planes = [torch.randn(1, 64, *size) for size in ((2, 3), (5, 1), (1, 1))]
    expected = plain(block, torch.cat([p.flatten(2) for p in planes], dim=2))
    assert_close(torch.cat([p.flatten(2) for p in block(planes)], dim=2), expected, OPERATION[torch.float32])


def test_a_new_block_is_the_identity() -> None:
    x = torch.randn(1, 32, 11)
    assert torch.equal(TriplaneAttention(32)(x), x)


def test_width_of_heads() -> None:
    assert TriplaneAttention(64, num_head_channels=16).num_heads == 4
    with pytest.raises(ValueError, match="num_head_channels 24 must divide"):
        TriplaneAttention(64, num_head_channels=24)


@pytest.mark.parametrize(("channels", "heads"), [(48, 1), (64, 3), (64, 0)])
def test_sizes_that_do_not_divide(channels: int, heads: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        TriplaneAttention(channels, heads)


def test_wrong_shapes(block: TriplaneAttention) -> None:
    with pytest.raises(ValueError, match=r"Packed planes must be \(B, 64, N\)"):
        block(torch.randn(2, 63, 5))
    with pytest.raises(ValueError, match=r"Planes must be \(B, 64, h, w\)"):
        block([torch.randn(2, 64, 5)])
    with pytest.raises(ValueError, match="not empty"):
        block(torch.randn(0, 64, 5))


def test_autocast_and_half_precision(block: TriplaneAttention) -> None:
    x = torch.randn(2, 64, LAYOUT.num_tokens)
    exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(block(x), exact, 1e-2)  # three roundings to bfloat16 (4e-3 each) on the way
    low = block.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close(low, exact, 1.5e-2)  # the same, with rounded parameters and input


@pytest.mark.slow
def test_compiles_to_one_graph(block: TriplaneAttention) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 64, LAYOUT.num_tokens)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), block(x), OPERATION[torch.float32])

"""Time embeddings of all residual blocks made together: one activation, on a GPU one product; the same values."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from comparison import assert_close
from tolerances import OPERATION
from torch import Tensor, nn

from pvdm_fast.analysis.recorder import Recorder, name_of
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.nn import ResidualBlock, planes, residual

FLOAT32 = OPERATION[torch.float32]


def blocks() -> list[ResidualBlock]:
    torch.manual_seed(0)
    return [ResidualBlock(32, 16, channels) for channels in (32, 64, 96)]


class Names(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        self.count[name_of(function)] += 1


@pytest.mark.parametrize("joined", [False, True])
def test_same_values_and_gradients(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "JOINED", frozenset({"cpu"} if joined else ()))
    made = blocks()
    embedding = torch.randn(2, 16, requires_grad=True)
    weights = [p for block in made for p in block.emb_layers.parameters()]

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        loss = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs)
        return [*outputs, *torch.autograd.grad(loss, [embedding, *weights])]

    with Names() as names:
        ready = residual.scale_shifts([*made, nn.Identity()], embedding)
    assert list(ready) == made
    assert names.count["silu"] == 1 and names.count["addmm"] == (1 if joined else 3)
    expected = [block.emb_layers(embedding) for block in made]
    for actual, other in zip(gradients(list(ready.values())), gradients(expected), strict=True):
        assert_close(actual, other, FLOAT32)


@pytest.mark.parametrize("hooked", [False, True])
def test_the_skip_is_added_in_the_convolution(hooked: bool) -> None:
    """One operation where the last convolution is plain. A hook on it sees its own output, without the skip."""
    block, layout = ResidualBlock(32, 16, 64), TriplaneLayout(2, 3, 4)
    last = block.out_layers["3"]
    nn.init.normal_(last.weight, std=0.05)
    x, embedding = torch.randn(2, layout.num_tokens, 32), torch.randn(2, 16)
    skip = planes.pointwise(block.skip_connection, x, layout)
    alone = block(x, embedding, layout) - skip
    if hooked:
        last.register_forward_hook(lambda module, inputs, output: 2 * output)
    with Names() as names:
        out = block(x, embedding, layout)
    assert names.count["add"] == hooked
    assert_close(out, skip + (2 if hooked else 1) * alone, FLOAT32)


def test_a_wider_skip_stays_wide() -> None:
    """Under autocast the convolution is bfloat16. A float32 stream is added to it as PyTorch adds."""
    block, layout = ResidualBlock(32, 16, 32), TriplaneLayout(2, 3, 4)
    x, embedding = torch.randn(2, layout.num_tokens, 32), torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x, embedding, layout).dtype == torch.float32
        assert block(x.bfloat16(), embedding, layout).dtype == torch.bfloat16


def test_blocks_that_are_not_plain_make_their_own() -> None:
    made = blocks()
    made[0].emb_layers[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    made[1].register_forward_pre_hook(lambda module, inputs: None)
    assert list(residual.scale_shifts(made, torch.randn(2, 16))) == made[2:]
    assert not residual.scale_shifts(made[:2], torch.randn(2, 16))

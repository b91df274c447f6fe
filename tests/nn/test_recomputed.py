"""Steps in pieces that the backward pass recomputes: the same values and gradients, and little memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from comparison import assert_close, relative_error
from tolerances import OPERATION
from torch import Tensor, nn

from benchmarks.memory import saved_bytes
from pvdm_fast import TriplaneLayout, use_backend
from pvdm_fast.nn import AxialTransformer, PlaneProjection, recomputed
from pvdm_fast.nn.axial_transformer import AxialAttention, GatedFeedForward, PreNorm
from pvdm_fast.nn.projection import FeedForward

FLOAT32 = OPERATION[torch.float32]
LAYOUT = TriplaneLayout(3, 5, 7)
CHANNELS = 16
SMALL = 4096  # bytes per piece: 8 rows of the gated feed-forward in float32, 21 tokens of an attention
WHOLE = 1 << 40


class Step(nn.Module):
    """A single step as a network: its branch is added to the stream."""

    def __init__(self, fn: nn.Module, *arguments: Any) -> None:
        super().__init__()
        self.step, self.arguments = PreNorm(CHANNELS, fn), arguments

    def forward(self, x: Tensor) -> Tensor:
        stream, branch = self.step(x, None, *self.arguments)
        return stream + branch


class Transformer(AxialTransformer):
    def __init__(self) -> None:
        super().__init__(CHANNELS, 2, 2, 8)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, LAYOUT)


LATTICE = (2, LAYOUT.num_lattice_tokens, CHANNELS)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "geglu": (lambda: Step(GatedFeedForward(CHANNELS)), LATTICE),
    "gelu": (lambda: Step(FeedForward(CHANNELS, 80)), LATTICE),
    "time": (lambda: Step(AxialAttention(CHANNELS, 2, 8, "time"), LAYOUT, None), LATTICE),
    "space": (lambda: Step(AxialAttention(CHANNELS, 2, 8, "space"), LAYOUT, None), LATTICE),
    "transformer": (Transformer, LATTICE),
    "projection": (lambda: PlaneProjection(CHANNELS, 3, 80), (2, 13, 6, CHANNELS)),
}
EVERY = pytest.mark.parametrize("name", NETWORKS)


def results(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, piece: int) -> list[Tensor]:
    """The result, and the gradients of x and all parameters, with pieces of so many bytes."""
    monkeypatch.setattr(recomputed, "PIECE_ON_CPU", piece)
    x = x.clone().requires_grad_()
    y = module(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.fixture
def made_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every norm that was recomputed."""
    rows: list[int] = []
    again = recomputed._again

    def noted(total: Tensor, *rest: Any) -> Tensor:
        rows.append(total.numel() // total.shape[-1])
        return again(total, *rest)

    monkeypatch.setattr(recomputed, "_again", noted)
    return rows


@EVERY
def test_against_float64(name: str, monkeypatch: pytest.MonkeyPatch, made_again: list[int]) -> None:
    make, shape = NETWORKS[name]
    module, x = make(), torch.randn(shape)
    actual = results(module, x, monkeypatch, SMALL)
    assert len(made_again) > 5
    # the last piece is smaller than the others, but frames are equal
    assert name == "space" or len(set(made_again)) > 1
    made_again.clear()
    expected = results(module.double(), x.double(), monkeypatch, WHOLE)
    assert not made_again
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, FLOAT32, f"result {index}")


@EVERY
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_are_as_good_as_in_one_piece(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = NETWORKS[name]
    module, x = make(), torch.randn(shape)
    exact = results(module.double(), x.double(), monkeypatch, WHOLE)
    dtype = torch.float32 if autocast else torch.bfloat16
    context: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        whole = results(module.to(dtype), x.to(dtype), monkeypatch, WHOLE)
        pieces = results(module, x.to(dtype), monkeypatch, SMALL)
    for index, (a, w, e) in enumerate(zip(pieces, whole, exact, strict=True)):
        assert a.dtype == w.dtype
        # Both round in the same places, so errors are alike. The extra quarter allows for chance.
        assert relative_error(a, e) <= 1.25 * relative_error(w, e), index


@EVERY
def test_gradient_of_stride_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = NETWORKS[name]
    module, x = make(), torch.randn(shape)
    gradients = []
    for piece in (SMALL, WHOLE):
        monkeypatch.setattr(recomputed, "PIECE_ON_CPU", piece)
        gradients.append(torch.autograd.grad(module(x).sum(), list(module.parameters())))
    for a, e in zip(*gradients, strict=True):
        assert_close(a, e, FLOAT32)


@EVERY
def test_under_checkpointing_and_twice_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = NETWORKS[name]
    module, x = make(), torch.randn(shape)
    first = results(module, x, monkeypatch, SMALL)
    again = results(module, x, monkeypatch, SMALL)
    module.gradient_checkpointing = True  # type: ignore[assignment]
    nested = results(module, x, monkeypatch, SMALL)
    for a, b, c in zip(first, again, nested, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.slow
@EVERY
def test_compiles_to_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    make, shape = NETWORKS[name]
    module, x = make(), torch.randn(shape)
    expected = results(module, x, monkeypatch, SMALL)
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, e in zip(results(compiled, x, monkeypatch, SMALL), expected, strict=True):
        assert_close(a, e, FLOAT32)


@EVERY
def test_frozen_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = NETWORKS[name]
    module, x = make(), torch.randn(shape)
    monkeypatch.setattr(recomputed, "PIECE_ON_CPU", SMALL)
    x = x.requires_grad_()
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    (dx,) = torch.autograd.grad(module.requires_grad_(False)(x).square().sum(), x)
    assert_close(dx, expected, FLOAT32)
    biases = [p.requires_grad_() for p in module.parameters() if p.dim() == 1]
    assert all(g is not None for g in torch.autograd.grad(module(x).sum(), biases, allow_unused=True))
    with torch.no_grad():
        assert not module(x).requires_grad


def test_the_backward_pass_asks_for_the_same_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    again = recomputed._again

    def noted(*arguments: Any) -> Tensor:
        asked.append(arguments[-1])
        return again(*arguments)

    monkeypatch.setattr(recomputed, "_again", noted)
    monkeypatch.setattr(recomputed, "PIECE_ON_CPU", SMALL)
    make, shape = NETWORKS["transformer"]
    with use_backend("reference"):
        y = make()(torch.randn(shape))
    y.sum().backward()
    assert set(asked) == {"reference"}


def kept(module: nn.Module, shape: tuple[int, ...]) -> int:
    x = torch.randn(shape, requires_grad=True)
    return saved_bytes(lambda: [module(x)], list(module.parameters()))


def test_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each step, the stream and its norm's two statistics. Of an attention also its result, and one number per
    query."""
    monkeypatch.setattr(recomputed, "PIECE_ON_CPU", SMALL)
    tokens, heads, width, item = LATTICE[0] * LATTICE[1], 2, 8, 4
    step = tokens * (CHANNELS + 2) * item
    result = tokens * (heads * width + heads) * item
    assert kept(NETWORKS["geglu"][0](), LATTICE) == kept(NETWORKS["gelu"][0](), LATTICE) == step
    assert kept(NETWORKS["time"][0](), LATTICE) == kept(NETWORKS["space"][0](), LATTICE) == step + result
    tables = 2 * (LAYOUT.time + LAYOUT.height * LAYOUT.width) * width * item
    assert kept(Transformer(), LATTICE) == 2 * (3 * step + 2 * result) + tables

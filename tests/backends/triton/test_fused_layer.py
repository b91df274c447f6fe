"""Where the autoencoder's layers take the operations that fuse their parts, in Triton's interpreter."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import torch
from comparison import assert_close
from tolerances import OPERATION
from torch import Tensor, nn

from pvdm_fast import TriplaneLayout, use_backend
from pvdm_fast.backends import choice
from pvdm_fast.kernels import feed_forward_block, space_attention_heads, time_attention_block
from pvdm_fast.nn import AxialTransformer
from pvdm_fast.ops import fusing

# In the order in which a layer calls them.
KERNELS = {
    "time_attention_block": time_attention_block,
    "space_attention_heads": space_attention_heads,
    "feed_forward_block": feed_forward_block,
}
TIME, SPACE, BEHIND = KERNELS
LAYOUT = TriplaneLayout(3, 4, 5)
space_rule = import_module("pvdm_fast.ops.space_attention_heads")  # the package has a function of that name


def network() -> AxialTransformer:
    return AxialTransformer(24, 2, 2, 8)


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, LAYOUT.num_lattice_tokens, 24)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused operations as they are computed. Two clips have just enough tokens for them."""
    found: list[str] = []
    for name, module in KERNELS.items():

        def counted(*arguments: Any, name: str = name, forward: Any = module.forward) -> Tensor:
            found.append(name)
            return forward(*arguments)

        monkeypatch.setattr(module, "forward", counted)
    monkeypatch.setattr(fusing, "LEAST_TOKENS", 120)
    monkeypatch.setattr(space_rule, "LEAST_SITES", 20)
    return found


def check(transformer: AxialTransformer) -> None:
    """The results are those of the layers one by one in float64, and the tokens are left as they were."""
    x = tokens()
    before = x.clone()
    expected = transformer.double()(x.double(), LAYOUT)
    transformer.float()
    with use_backend("triton"):
        assert_close(transformer(x, LAYOUT), expected, OPERATION[torch.float32])
    assert torch.equal(x, before)


@torch.no_grad()
def test_a_network_without_gradient(calls: list[str]) -> None:
    check(network())
    assert calls == 2 * [*KERNELS]


@pytest.mark.parametrize("why", ["gradient", "tokens", "autocast", "backend"])
def test_when_they_are_not_taken(calls: list[str], why: str) -> None:
    with (
        use_backend("auto" if why == "backend" else "triton"),
        torch.set_grad_enabled(why == "gradient"),
        torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"),
    ):
        network()(tokens(1 if why == "tokens" else 2), LAYOUT)
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize("op", KERNELS)
def test_without_one_of_them(monkeypatch: pytest.MonkeyPatch, calls: list[str], op: str) -> None:
    """As on GPUs where it isn't served."""
    serves = choice.serves
    monkeypatch.setattr(choice, "serves", lambda backend, asked, *rest: asked != op and serves(backend, asked, *rest))
    check(network())
    assert calls == 2 * [name for name in KERNELS if name != op]


@torch.no_grad()
def test_frames_of_few_tokens(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(space_rule, "LEAST_SITES", 21)
    check(network())
    assert calls == 2 * [TIME, BEHIND]


@torch.no_grad()
@pytest.mark.parametrize(
    ("place", "lost"),
    [
        *((place, [TIME]) for place in ("0", "0.norm", "0.fn", "0.fn.to_qkv", "0.fn.to_out.0")),
        *((place, [SPACE, BEHIND]) for place in ("1", "1.fn")),
        *((place, [SPACE]) for place in ("1.norm", "1.fn.to_qkv")),
        *((place, [BEHIND]) for place in ("1.fn.to_out.0", "2", "2.fn", "2.norm", "2.fn.net.0", "2.fn.net.3")),
    ],
)
def test_layers_with_hooks_are_called(calls: list[str], place: str, lost: list[str]) -> None:
    transformer, seen = network(), []
    transformer.layers[0].get_submodule(place).register_forward_hook(lambda *_: seen.append(place))
    check(transformer)
    assert seen == 2 * [place]
    assert calls == [*(name for name in KERNELS if name not in lost), *KERNELS], "the other layer is plain"


@torch.no_grad()
@pytest.mark.parametrize(("step", "op"), [(0, TIME), (1, SPACE)])
def test_a_bias_of_qkv_is_not_dropped(calls: list[str], step: int, op: str) -> None:
    transformer = network()
    transformer.layers[0][step].fn.to_qkv.bias = nn.Parameter(torch.randn(48))
    check(transformer)
    assert calls.count(op) == 1


@pytest.mark.parametrize("op", [TIME, BEHIND])
def test_not_on_gpus_of_amd(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in str(choice.why_not("triton", op))

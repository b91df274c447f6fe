"""Both networks with every operation on Triton, forward and backward, against values of the authors' release.

They take minutes in the interpreter, and CI runs them where kernels, operations or networks changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from comparison import assert_close
from golden_tools import load_case
from models.test_golden import check_gradients
from tolerances import GOLDEN_NETWORK

from pvdm_fast import TriplaneLayout, use_backend
from pvdm_fast.backends import choice
from pvdm_fast.models.release import load_release_autoencoder, load_release_denoiser
from pvdm_fast.ops import fusing

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not choice.interpreting(), reason="needs Triton: pip install triton"),
]
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from pvdm_fast.kernels import (  # noqa: E402
    configs,
    feed_forward_block,
    plane_norm_tiles,
    space_attention_heads,
    time_attention_block,
)
from pvdm_fast.kernels.launch import Config  # noqa: E402

# How much larger tiles are than in the operations' own tests, by the start of the table's name. The interpreter's time
# depends on programs and their steps, not on a tile's size: with the usual tiles it takes 20 minutes.
LARGER = {
    "segment_attention": {"BLOCK_M": 8, "BLOCK_N": 8},
    "axial_attention_long": {"BLOCK_M": 4, "BLOCK_N": 4},
    "axial_attention_short": {"BLOCK": 8},
    "plane_conv_weight": {"BLOCK_K": 8},
    "plane_conv": {"BLOCK_M": 8},
}


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = configs.ConfigTable.__call__

    def larger(table: configs.ConfigTable, *asked: Any) -> Config:
        config = choose(table, *asked)
        times = next((times for name, times in LARGER.items() if table.name.startswith(name)), {})
        return replace(config, blocks={name: size * times.get(name, 1) for name, size in config.blocks.items()})

    monkeypatch.setattr(configs.ConfigTable, "__call__", larger)
    monkeypatch.setattr(plane_norm_tiles, "ENOUGH_PROGRAMS", 1)  # eight groups per program


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    """Asks for Triton by name, so that an operation without a kernel is an error."""
    with use_backend("triton"):
        yield


def test_denoiser() -> None:
    case = load_case("unet_small")
    state = {f"module.diffusion_model.{name}": tensor for name, tensor in case.parameters().items()}
    layout = TriplaneLayout(**case.meta["layout"])
    model = load_release_denoiser(state, layout=layout, num_heads=case.meta["config"]["num_heads"])
    x = case.input("x").requires_grad_()
    y = model(x, torch.tensor(case.meta["t"])).sample
    assert_close(y, case.tensors["output.unconditional"], GOLDEN_NETWORK)
    y.backward(case.draw("grad_output", tuple(y.shape)))
    check_gradients(case, model, {"x": x}, GOLDEN_NETWORK)


def test_autoencoder() -> None:
    case = load_case("autoencoder_small")
    config = case.meta["ddconfig"]
    model = load_release_autoencoder(case.parameters(), frames=config["timesteps"], resolution=config["resolution"])
    video = case.draw("input.video", (1, 3, 16, 48, 48)).tanh().requires_grad_()
    latent = model.encode(video).latent
    assert_close(latent, case.tensors["output.latent"], GOLDEN_NETWORK)
    frames = model.decode(latent).sample.transpose(1, 2).flatten(0, 1)  # the release's form, (B T, 3, H, W)
    assert_close(frames, case.tensors["output.reconstruction"], GOLDEN_NETWORK)
    frames.backward(case.draw("grad_output", tuple(frames.shape)))
    check_gradients(case, model, {"video": video}, GOLDEN_NETWORK)


@torch.no_grad()
def test_autoencoder_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time attention, the heads of space attention and what follows them are one operation each, if there are
    enough tokens."""
    calls: list[str] = []
    monkeypatch.setattr(fusing, "LEAST_TOKENS", 1)
    monkeypatch.setattr(import_module("pvdm_fast.ops.space_attention_heads"), "LEAST_SITES", 1)

    def counted(name: str, module: Any) -> None:
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *a: calls.append(name) or forward(*a))

    counted("feed_forward_block", feed_forward_block)
    counted("space_attention_heads", space_attention_heads)
    counted("time_attention_block", time_attention_block)
    case = load_case("autoencoder_small")
    config = case.meta["ddconfig"]
    model = load_release_autoencoder(case.parameters(), frames=config["timesteps"], resolution=config["resolution"])
    latent = model.encode(case.draw("input.video", (1, 3, 16, 48, 48)).tanh()).latent
    assert_close(latent, case.tensors["output.latent"], GOLDEN_NETWORK)
    frames = model.decode(latent).sample.transpose(1, 2).flatten(0, 1)
    assert_close(frames, case.tensors["output.reconstruction"], GOLDEN_NETWORK)
    layers = len(model.encoder.layers) + len(model.decoder.layers)
    assert calls == layers * ["time_attention_block", "space_attention_heads", "feed_forward_block"]

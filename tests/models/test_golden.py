"""Blocks and whole networks against values of the authors' release: outputs and gradients, in float32."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, relative_error
from golden_tools import GoldenCase, load_case
from tolerances import GOLDEN_BLOCK, GOLDEN_NETWORK, NO_GRADIENT
from torch import Tensor, nn

from pvdm_fast import TriplaneAttention, TriplaneLayout
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.release import load_release_autoencoder, load_release_denoiser
from pvdm_fast.nn import PlaneAttention, ResidualBlock


def check_gradients(case: GoldenCase, module: nn.Module, inputs: dict[str, Tensor], tolerance: float) -> None:
    """Compares every gradient in the case, complete or as its norm."""
    parameters = dict(module.named_parameters())
    checked = 0
    for name, expected in case.tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "grad":
            where, _, key = rest.partition(".")
            gradient = inputs[key].grad if where == "input" else parameters[key].grad
            assert gradient is not None, name
            assert_close(gradient, expected, tolerance, name)
        elif kind == "grad_norm":
            gradient = parameters[rest].grad
            assert gradient is not None and torch.isfinite(gradient).all(), name
            noise = NO_GRADIENT * case.tensors[f"{name.removesuffix('.bias')}.weight"] if name.endswith(".bias") else 0
            if expected < noise:
                assert gradient.norm() < noise, name
            else:
                assert relative_error(gradient.norm(), expected) <= tolerance, name
        checked += kind in ("grad", "grad_norm")
    assert checked == sum(name.startswith("grad") for name in case.tensors) > 0


@pytest.mark.parametrize("name", ["attention_1d", "attention_1d_odd"])
def test_attention_across_planes(name: str) -> None:
    case = load_case(name)
    block = TriplaneAttention(case.meta["channels"], case.meta["num_heads"])
    block.load_state_dict(case.parameters(), strict=True)
    x = case.input("x").requires_grad_()
    y = block(x)
    assert_close(y, case.tensors["output.y"], GOLDEN_BLOCK)
    y.backward(case.draw("grad_output", tuple(y.shape)))
    check_gradients(case, block, {"x": x}, GOLDEN_BLOCK)


def to_tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, layout: PlaneLayout) -> Tensor:
    return layout.split(tokens)[0].permute(0, 3, 1, 2)


def test_attention_inside_planes() -> None:
    case = load_case("attention_2d")
    block = PlaneAttention(case.meta["channels"], case.meta["num_heads"])
    block.load_state_dict(case.parameters(), strict=True)
    x = case.input("x").requires_grad_()
    layout = PlaneLayout(((x.shape[2], x.shape[3]),))
    y = to_image(block(to_tokens(x), layout), layout)
    assert_close(y, case.tensors["output.y"], GOLDEN_BLOCK)
    y.backward(case.draw("grad_output", tuple(y.shape)))
    check_gradients(case, block, {"x": x}, GOLDEN_BLOCK)


@pytest.mark.parametrize("name", ["resblock_same", "resblock_wider", "resblock_up", "resblock_down"])
def test_residual_block(name: str) -> None:
    case = load_case(name)
    channels = case.meta["channels"]
    resample = "up" if case.meta.get("up") else "down" if case.meta.get("down") else None
    block = ResidualBlock(channels, case.meta["emb_channels"], case.meta.get("out_channels", channels), resample)
    block.load_state_dict(case.parameters(), strict=True)
    x, emb = case.input("x").requires_grad_(), case.input("emb").requires_grad_()
    layout = PlaneLayout(((x.shape[2], x.shape[3]),))
    y = to_image(block(to_tokens(x), emb, layout), block.output_layout(layout))
    assert_close(y, case.tensors["output.y"], GOLDEN_BLOCK)
    y.backward(case.draw("grad_output", tuple(y.shape)))
    check_gradients(case, block, {"x": x, "emb": emb}, GOLDEN_BLOCK)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    case = load_case("unet_small")
    state = {f"module.diffusion_model.{name}": tensor for name, tensor in case.parameters().items()}
    layout = TriplaneLayout(**case.meta["layout"])
    model = load_release_denoiser(state, layout=layout, num_heads=case.meta["config"]["num_heads"])
    for key in ("model_channels", "channel_mult", "num_res_blocks"):
        assert model.config[key] == case.meta["config"][key]
    assert sorted(model.config.attention_resolutions) == sorted(case.meta["config"]["attention_resolutions"])
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_denoiser(denoiser: Denoiser, checkpointing: bool) -> None:
    case = load_case("unet_small")
    shape = tuple(case.meta["inputs"]["x"])
    x, condition = case.input("x").requires_grad_(), case.draw("input.cond", shape).tanh()
    t = torch.tensor(case.meta["t"])
    denoiser.zero_grad()
    denoiser.enable_gradient_checkpointing() if checkpointing else denoiser.disable_gradient_checkpointing()
    with torch.no_grad():
        assert_close(denoiser(x, t, condition).sample, case.tensors["output.conditional"], GOLDEN_NETWORK)
    y = denoiser(x, t).sample
    assert_close(y, case.tensors["output.unconditional"], GOLDEN_NETWORK)
    y.backward(case.draw("grad_output", tuple(y.shape)))
    check_gradients(case, denoiser, {"x": x}, GOLDEN_NETWORK)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    case = load_case("autoencoder_small")
    config = case.meta["ddconfig"]
    return load_release_autoencoder(case.parameters(), frames=config["timesteps"], resolution=config["resolution"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autoencoder(autoencoder: Autoencoder, checkpointing: bool) -> None:
    case = load_case("autoencoder_small")
    video = case.draw("input.video", (1, 3, 16, 48, 48)).tanh().requires_grad_()
    autoencoder.zero_grad()
    autoencoder.enable_gradient_checkpointing() if checkpointing else autoencoder.disable_gradient_checkpointing()
    latent = autoencoder.encode(video).latent
    assert_close(latent, case.tensors["output.latent"], GOLDEN_NETWORK)
    reconstruction = autoencoder.decode(latent).sample
    frames = reconstruction.transpose(1, 2).flatten(0, 1)  # the release's form, (B T, 3, H, W)
    assert_close(frames, case.tensors["output.reconstruction"], GOLDEN_NETWORK)
    frames.backward(case.draw("grad_output", tuple(frames.shape)))
    check_gradients(case, autoencoder, {"video": video}, GOLDEN_NETWORK)

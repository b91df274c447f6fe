"""The baseline of every benchmark computes the same as the authors' release: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, relative_error
from golden_tools import GoldenCase, load_case
from tolerances import GOLDEN_BLOCK, GOLDEN_NETWORK
from torch import Tensor, nn

from benchmarks.eager import RELEASE, SDPA, Attention, CrossPlane, EagerDenoiser, Residual, Variant
from benchmarks.eager_autoencoder import EagerAutoencoder

# If a bias precedes a GroupNorm with one channel per group, its gradient is only rounding: 1e-7 of the largest here.
ZERO = 1e-6
VARIANTS = pytest.mark.parametrize("variant", [RELEASE, SDPA], ids=["release", "sdpa"])


def check_backward(case: GoldenCase, y: Tensor, module: nn.Module, inputs: dict[str, Tensor], tolerance: float) -> None:
    """Compares every gradient in the case, complete or as its norm."""
    y.backward(case.draw("grad_output", tuple(y.shape)))
    leaves = {f"param.{name}": p for name, p in module.named_parameters()}
    leaves.update({f"input.{name}": x for name, x in inputs.items()})
    names = [name for name in case.tensors if name.startswith("grad")]
    largest = max(float(case.tensors[name].norm()) for name in names)
    for name in names:
        kind, _, rest = name.partition(".")
        gradient = leaves[rest if kind == "grad" else f"param.{rest}"].grad
        assert gradient is not None, name
        if float(case.tensors[name].norm()) < ZERO * largest:
            assert float(gradient.norm()) < ZERO * largest, name
        elif kind == "grad":
            assert_close(gradient, case.tensors[name], tolerance, name)
        else:
            assert relative_error(gradient.norm(), case.tensors[name]) <= tolerance, name
    assert names


@VARIANTS
@pytest.mark.parametrize("name", ["attention_1d", "attention_1d_odd", "attention_2d"])
def test_attention(name: str, variant: Variant) -> None:
    case = load_case(name)
    block = Attention(case.meta["channels"], case.meta["num_heads"], variant)
    block.load_state_dict(case.parameters())
    x = case.input("x").requires_grad_()
    y = block(x)
    assert_close(y, case.tensors["output.y"], GOLDEN_BLOCK)
    check_backward(case, y, block, {"x": x}, GOLDEN_BLOCK)


def test_planes_are_joined_and_split() -> None:
    block = CrossPlane(32, 4)
    planes = [torch.randn(2, 32, 3, 5), torch.randn(2, 32, 2, 5), torch.randn(2, 32, 2, 3)]
    joined = block(torch.cat([plane.flatten(2) for plane in planes], dim=2))
    assert torch.equal(torch.cat([plane.flatten(2) for plane in block.planes(planes)], dim=2), joined)


@pytest.mark.parametrize("name", ["resblock_same", "resblock_wider", "resblock_up", "resblock_down"])
def test_residual(name: str) -> None:
    case = load_case(name)
    channels = case.meta["channels"]
    resample = "up" if case.meta.get("up") else "down" if case.meta.get("down") else None
    block = Residual(channels, case.meta["emb_channels"], case.meta.get("out_channels", channels), resample)
    block.load_state_dict(case.parameters())
    x, emb = case.input("x").requires_grad_(), case.input("emb").requires_grad_()
    y = block(x, emb)
    assert_close(y, case.tensors["output.y"], GOLDEN_BLOCK)
    check_backward(case, y, block, {"x": x, "emb": emb}, GOLDEN_BLOCK)


@pytest.mark.slow
def test_denoiser() -> None:
    case = load_case("unet_small")
    config = case.meta["config"]
    names = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads")
    model = EagerDenoiser(**case.meta["layout"], latent_channels=4, **{name: config[name] for name in names})
    missing, unexpected = model.load_state_dict(case.parameters(), strict=False)
    assert not unexpected
    assert set(missing) <= {"zeros"}
    x = case.input("x").requires_grad_()
    t = torch.tensor(case.meta["t"])
    with torch.no_grad():
        conditional = model(x, t, case.draw("input.cond", tuple(x.shape)).tanh())
    assert_close(conditional, case.tensors["output.conditional"], GOLDEN_NETWORK)
    y = model(x, t)
    assert_close(y, case.tensors["output.unconditional"], GOLDEN_NETWORK)
    check_backward(case, y, model, {"x": x}, GOLDEN_NETWORK)


def test_autoencoder() -> None:
    case = load_case("autoencoder_small")
    config = case.meta["ddconfig"]
    size, p = config["resolution"], int((case.meta["params"]["encoder.to_patch_embedding.weight"][1] / 3) ** 0.5)
    depth = 1 + max(int(n.split(".")[2]) for n in case.meta["params"] if n.startswith("encoder.layers."))
    model = EagerAutoencoder(
        frames=config["timesteps"], height=size, width=size, patch_size=p, channels=config["channels"],
        depth=depth, num_heads=8, head_dim=64, latent_channels=case.meta["embed_dim"],
    )  # fmt: skip
    missing, unexpected = model.load_state_dict(case.parameters(), strict=False)
    assert not unexpected
    assert not [name for name in missing if name in dict(model.named_parameters())]
    video = case.draw("input.video", (1, 3, config["timesteps"], size, size)).tanh().requires_grad_()
    latent = model.encode(video)
    assert_close(latent, case.tensors["output.latent"], GOLDEN_NETWORK)
    frames = model.decode(latent).transpose(1, 2).flatten(0, 1)
    assert_close(frames, case.tensors["output.reconstruction"], GOLDEN_NETWORK)
    check_backward(case, frames, model, {"video": video}, GOLDEN_NETWORK)

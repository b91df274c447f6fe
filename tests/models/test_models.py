"""The two models as users meet them: presets, free sizes, saving, checkpointing, dtypes, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close
from filling import randomised
from tolerances import GOLDEN_NETWORK
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import saved_bytes
from pvdm_fast import TriplaneLayout
from pvdm_fast.models import Autoencoder, Denoiser

AE: dict[str, Any] = dict(frames=3, height=20, width=28, patch_size=4, channels=32, depth=1, num_heads=2, head_dim=8)
UNET: dict[str, Any] = dict(
    time=2, height=6, width=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2],
    num_heads=2,
)  # fmt: skip


@pytest.mark.parametrize(("name", "autoencoder", "denoiser"), [("base", 62.1, 528.3)])
def test_full_size_has_the_releases_parameters(name: str, autoencoder: float, denoiser: float) -> None:
    with torch.device("meta"):
        models = Autoencoder.from_preset(name), Denoiser.from_preset(name)
    for model, millions in zip(models, (autoencoder, denoiser), strict=True):
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.05


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_presets_fit_each_other(name: str) -> None:
    with torch.device("meta"):
        assert Autoencoder.from_preset(name).layout == Denoiser.from_preset(name).layout


def test_preset_overrides() -> None:
    assert Denoiser.from_preset("tiny", time=4).layout.time == 4
    with pytest.raises(ValueError, match="no preset 'huge': choose one of tiny, small, base"):
        Autoencoder.from_preset("huge")


def test_free_unequal_sizes() -> None:
    model = Autoencoder(**AE)
    assert model.layout == TriplaneLayout(3, 5, 7)
    video = torch.rand(2, 3, 3, 20, 28) * 2 - 1
    latent = model.encode(video).latent
    assert latent.shape == (2, 4, model.layout.num_tokens) and latent.abs().max() <= 1
    sample = model.decode(latent).sample
    assert sample.shape == video.shape and sample.abs().max() <= 1
    assert torch.equal(model(video).sample, sample)


def test_one_clip_of_a_batch_is_independent() -> None:
    model, unet = Autoencoder(**AE), randomised(Denoiser(**UNET))
    videos = torch.rand(2, 3, 3, 20, 28) * 2 - 1
    assert_close(model(videos).sample[1:], model(videos[1:]).sample, GOLDEN_NETWORK)
    latents, t = torch.randn(2, 4, unet.layout.num_tokens), torch.tensor([3, 900])
    assert_close(unet(latents, t).sample[1:], unet(latents[1:], 900).sample, GOLDEN_NETWORK)


def test_condition_matters_and_defaults_to_zeros() -> None:
    unet = randomised(Denoiser(**UNET))
    latent = torch.randn(1, 4, unet.layout.num_tokens)
    assert torch.equal(unet(latent, 5).sample, unet(latent, 5, torch.zeros_like(latent)).sample)
    assert not torch.equal(unet(latent, 5).sample, unet(latent, 5, torch.ones_like(latent)).sample)


@pytest.mark.parametrize("kind", ["autoencoder", "denoiser"])
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model: Any = Autoencoder(**AE) if kind == "autoencoder" else randomised(Denoiser(**UNET))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = type(model).from_pretrained(tmp_path)
    assert again.layout == model.layout
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def gradients(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model(*inputs).sample.float().square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["autoencoder", "denoiser"])
def test_checkpointing_keeps_autocast(kind: str) -> None:
    """Recomputes under the same autocast: the gradients are bit-identical."""
    if kind == "autoencoder":
        model: Any = Autoencoder(**AE)
        inputs = (torch.rand(1, 3, 3, 20, 28),)
    else:
        model = randomised(Denoiser(**UNET))
        inputs = (torch.randn(1, 4, model.layout.num_tokens), torch.tensor([7]))
    stored = gradients(model, *inputs)
    model.enable_gradient_checkpointing()
    recomputed = gradients(model, *inputs)
    assert len(stored) == len(list(model.parameters())) == len(recomputed)
    assert all(torch.equal(a, b) for a, b in zip(stored, recomputed, strict=True))


@pytest.mark.parametrize("kind", ["autoencoder", "denoiser"])
def test_bfloat16_end_to_end(kind: str) -> None:
    if kind == "autoencoder":
        model: Any = Autoencoder(**AE)
        inputs = [torch.rand(1, 3, 3, 20, 28)]
    else:
        model = randomised(Denoiser(**UNET))
        inputs = [torch.randn(1, 4, model.layout.num_tokens)]
    rest = [] if kind == "autoencoder" else [3]
    exact = model(*inputs, *rest).sample
    low = model.to(torch.bfloat16)(*[i.bfloat16() for i in inputs], *rest).sample
    assert low.dtype == torch.bfloat16
    assert_close(low, exact, 5e-2)  # dozens of roundings to 8 bits in a row


@pytest.mark.parametrize("kind", ["autoencoder", "denoiser"])
@pytest.mark.slow
def test_compiles_to_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    if kind == "autoencoder":
        model: Any = Autoencoder(**AE)
        inputs = (torch.rand(1, 3, 3, 20, 28),)
    else:
        model = randomised(Denoiser(**UNET))
        inputs = (torch.randn(1, 4, model.layout.num_tokens), torch.tensor([7]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs).sample, model(*inputs).sample, 1e-5)


def test_resolution_not_divisible_by_the_patch() -> None:
    with pytest.raises(ValueError, match="width 30 is not divisible by the patch size 4"):
        Autoencoder(**{**AE, "width": 30})


def test_layout_not_divisible_by_the_levels() -> None:
    with pytest.raises(ValueError, match="7 is not divisible by 2"):
        Denoiser(**{**UNET, "width": 7})
    with pytest.raises(ValueError, match="must be one of noise, v, flow, not 'x0'"):
        Denoiser(**UNET, prediction="x0")


def test_inputs_that_do_not_fit() -> None:
    model, unet = Autoencoder(**AE), Denoiser(**UNET)
    with pytest.raises(ValueError, match=r"video must be \(B, 3, 3, 20, 28\)"):
        model.encode(torch.zeros(1, 3, 3, 28, 20))
    with pytest.raises(ValueError, match=r"B > 0"):
        model.encode(torch.zeros(0, 3, 3, 20, 28))
    with pytest.raises(ValueError, match=r"latent must be \(B, 4, 71\)"):
        model.decode(torch.zeros(1, 4, 70))
    latent = torch.zeros(2, 4, unet.layout.num_tokens)
    with pytest.raises(ValueError, match="latent must be"):
        unet(latent[..., 1:], 3)
    with pytest.raises(ValueError, match="condition must be"):
        unet(latent, 3, latent[:1])


def test_learned_positions_tell_places_and_planes_apart() -> None:
    """With them, tokens with the same values differ, in the order of the packed planes. And they are trained."""
    model = Denoiser(**UNET, positions=True)
    vectors = model.position_vectors
    assert vectors is not None
    packed = vectors()
    xy, yt, xt = model.layout.split(packed, dim=0)
    expected = (
        vectors.height[1] + vectors.width[2] + vectors.plane[0],
        vectors.time[1] + vectors.width[2] + vectors.plane[1],
        vectors.time[1] + vectors.height[2] + vectors.plane[2],
    )
    for plane, value in zip((xy, yt, xt), expected, strict=True):
        assert torch.allclose(plane[1, 2], value)
    model = randomised(model)
    model(torch.randn(2, 4, model.layout.num_tokens), 3).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vectors.parameters())


def weigh_full_size(model: Autoencoder) -> int:
    """Bytes kept for the backward pass of one clip of 16 x 256 x 256. Only shapes are run."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.load_state_dict({name: torch.empty(t.shape) for name, t in model.state_dict().items()}, assign=True)
        video = torch.empty(1, 3, 16, 256, 256, requires_grad=True)
        return saved_bytes(lambda: [model(video).sample], list(model.parameters()))


@pytest.mark.slow
def test_memory_of_the_full_size_autoencoder() -> None:
    """3.0 GiB, against 23.1 of the release's own code. 1.3 GiB if every layer is recomputed."""
    with torch.device("meta"):
        model = Autoencoder.from_preset("base")
    stored = weigh_full_size(model)
    assert stored < 3.1 * 2**30
    model.decoder.gradient_checkpointing = True
    mixed = weigh_full_size(model)
    model.enable_gradient_checkpointing()
    recomputed = weigh_full_size(model)
    assert recomputed < 1.4 * 2**30
    assert recomputed < mixed - 2**29 < stored - 2**30  # the option works block by block


def test_checkpointing_single_blocks_of_the_denoiser() -> None:
    unet = randomised(Denoiser(**UNET))
    inputs = torch.randn(1, 4, unet.layout.num_tokens), torch.tensor([7])

    def weight() -> int:
        return saved_bytes(lambda: [unet(*inputs).sample], list(unet.parameters()))

    stored, expected = weight(), gradients(unet, *inputs)
    for block in (unet.middle_block[0], unet.mid_attn, unet.input_blocks[2][0]):
        before = weight()
        block.gradient_checkpointing = True
        assert weight() < before
    assert all(torch.equal(a, b) for a, b in zip(gradients(unet, *inputs), expected, strict=True))
    unet.enable_gradient_checkpointing()
    assert weight() < 0.7 * stored

"""Noise schedule, loss and training batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comparison import assert_close
from golden_tools import GoldenCase, load_case
from tolerances import GOLDEN_NETWORK
from torch import Tensor

from pvdm_fast.diffusion.noise import diffusion_loss, joint_batch
from pvdm_fast.losses.psnr import psnr
from pvdm_fast.models import Denoiser
from pvdm_fast.models.noise_schedule import NoiseSchedule
from pvdm_fast.models.release import load_release_denoiser


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    return load_case("diffusion_small")


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    unet = load_case("unet_small")
    return load_release_denoiser(unet.parameters(), num_heads=unet.meta["config"]["num_heads"]).eval()


def test_the_schedule_is_the_release_s_to_the_bit(case: GoldenCase) -> None:
    schedule = NoiseSchedule.create()
    assert torch.equal(schedule.betas, case.tensors["betas"])
    assert torch.equal(schedule.alphas_cumprod, case.tensors["alphas_cumprod"])


def test_loss_and_noising_equal_the_release(case: GoldenCase, denoiser: Denoiser) -> None:
    schedule, shape = NoiseSchedule.create(), (2, 4, 2048)
    target, noise = case.draw("input.x0", shape).tanh(), case.draw("input.noise", shape)
    timestep = torch.tensor(case.meta["t"])
    assert_close(schedule.q_sample(target, noise, timestep), case.tensors["output.x_noisy"], 1e-6)
    condition = load_case("unet_small").draw("input.cond", shape).tanh()
    with torch.no_grad():
        loss = diffusion_loss(denoiser, schedule, target, condition, noise, timestep)
    assert_close(loss, case.tensors["output.loss_l2"], GOLDEN_NETWORK)


def test_the_loss_is_zero_for_a_denoiser_that_knows_the_noise() -> None:
    noise = torch.randn(2, 4, 12)
    loss = diffusion_loss(
        lambda *args, **kwargs: SimpleNamespace(sample=noise),
        NoiseSchedule.create(),
        torch.zeros(2, 4, 12),
        torch.zeros(2, 4, 12),
        noise,
        torch.tensor([3, 990]),
    )
    assert loss == 0


def test_v_is_the_same_prediction_and_weighs_its_error() -> None:
    """A network that predicts v gives the noise. The loss of v is that of the noise over alphas_cumprod."""
    schedule, shape = NoiseSchedule.create(), (2, 4, 12)
    model = Denoiser(time=2, height=2, width=2, model_channels=32, channel_mult=[1], num_heads=2, prediction="v")
    latent, noise, zeros = torch.rand(shape) * 2 - 1, torch.randn(shape), torch.zeros(shape)
    timestep = torch.tensor([3, 990])
    level = schedule.alphas_cumprod[timestep].view(-1, 1, 1)
    v = level.sqrt() * noise - (1 - level).sqrt() * latent
    model._unet = lambda tokens, embedding: v.transpose(1, 2)  # type: ignore[method-assign]
    assert torch.allclose(model(schedule.q_sample(latent, noise, timestep), timestep).sample, noise, atol=1e-5)
    arguments = (schedule, latent, zeros, noise, timestep)
    assert diffusion_loss(model, *arguments, "v") < 1e-6
    wrong = torch.full(shape, 0.1)
    model._unet = lambda tokens, embedding: (v + wrong).transpose(1, 2)  # type: ignore[method-assign]
    assert diffusion_loss(model, *arguments, "v").item() == pytest.approx(0.01, rel=1e-3)
    assert diffusion_loss(model, *arguments).item() == pytest.approx(0.01 * level.mean().item(), rel=1e-3)


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_min_snr_weighs_the_error_of_the_clean_latent(prediction: str) -> None:
    """By min(snr, 5), whatever the network puts out. At time 990 the snr is below 5, at 3 far above."""
    schedule, shape = NoiseSchedule.create(), (2, 4, 12)
    timestep = torch.tensor([3, 990])
    level = schedule.alphas_cumprod[timestep].view(-1, 1, 1)
    snr = level / (1 - level)
    assert snr[0] > 5 > snr[1]
    latent, noise, off = torch.rand(shape) * 2 - 1, torch.randn(shape), 0.1
    wrong = (schedule.q_sample(latent, noise, timestep) - level.sqrt() * (latent + off)) / (1 - level).sqrt()
    arguments = (schedule, latent, torch.zeros(shape), noise, timestep, prediction)
    loss = diffusion_loss(lambda *args, **kwargs: SimpleNamespace(sample=wrong), *arguments, "min_snr")
    assert loss.item() == pytest.approx(off**2 * snr.clamp(max=5).mean().item(), rel=1e-3)


def frame_numbers(video: Tensor) -> Tensor:
    """A stand-in encoder with latents (b, 1, T) that are the numbers of the frames."""
    return video[:, :1, :, 0, 0]


def numbered_clips(batch: int, frames: int) -> Tensor:
    """Each frame holds its number plus 100 times its clip's."""
    numbers = torch.arange(1.0, frames + 1) + 100 * torch.arange(1, batch + 1)[:, None]
    return numbers[:, None, :, None, None].expand(batch, 3, frames, 2, 2)


def test_joint_batches_have_the_right_frames_and_share_of_conditions() -> None:
    batch, half = 400, 4
    video = numbered_clips(batch, 2 * half)
    target, condition = joint_batch(video, frame_numbers, 0.3, torch.Generator().manual_seed(0))
    first = 100.0 * torch.arange(1, batch + 1) + 1
    conditional = condition[:, 0].any(dim=1)
    assert 0.25 < conditional.float().mean() < 0.35
    steps = torch.arange(half)
    assert torch.equal(condition[conditional, 0], first[conditional, None] + steps)
    assert torch.equal(target[conditional, 0], first[conditional, None] + half + steps)
    assert not condition[~conditional].any()
    starts = target[~conditional, 0, 0] - first[~conditional]
    assert torch.equal(target[~conditional, 0], first[~conditional, None] + starts[:, None] + steps)
    assert set(starts.tolist()) == set(range(half + 1)), "every window of the clip should be drawn"


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_joint_batches_at_the_ends_of_the_range(probability: float) -> None:
    _, condition = joint_batch(numbered_clips(3, 4), frame_numbers, probability, torch.Generator())
    assert bool(condition.any()) is bool(probability)


def test_the_release_draws_once_for_a_batch() -> None:
    video, half, seen = numbered_clips(3, 8), 4, set()
    first = 100.0 * torch.arange(1, 4) + 1
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        target, condition = joint_batch(video, frame_numbers, 0.5, generator, per_batch=True)
        starts = (target[:, 0, 0] - first).tolist()
        conditional = condition[:, 0].any(1).tolist()
        assert len(set(starts)) == len(set(conditional)) == 1
        seen.add((conditional[0], starts[0]))
    assert seen == {(True, half), *((False, start) for start in range(half + 1))}


@pytest.mark.parametrize("probability", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_clip_after_padding_has_no_condition(probability: float, dtype: torch.dtype) -> None:
    """Its target is the second half. A clip that is black in some frames only isn't padded."""
    black = 0 if dtype == torch.uint8 else -1
    video = numbered_clips(2, 8).to(dtype).clone()
    video[0, :, :4] = video[1, :, :3] = black
    drawn = (frame_numbers, probability, torch.Generator().manual_seed(0))
    target, condition = joint_batch(video, *drawn, pad_short=True)
    assert target[0, 0].tolist() == [105, 106, 107, 108]
    assert not condition[0].any()
    assert condition[1, 0].tolist() == ([black] * 3 + [204] if probability else [0] * 4)


def test_joint_batches_need_an_even_number_of_frames() -> None:
    with pytest.raises(ValueError, match="2T frames"):
        joint_batch(torch.zeros(1, 3, 5, 2, 2), frame_numbers, 0.5, torch.Generator())


def test_psnr_of_a_known_error() -> None:
    video = torch.zeros(2, 3, 2, 4, 4)
    # An error of 0.02 in a range of 2 is 1/100 of the peak: 40 dB.
    assert torch.allclose(psnr(video + 0.02, video), torch.tensor([40.0, 40.0]), atol=1e-3)


def test_noise_on_the_latent_reaches_the_decoder() -> None:
    """The option changes the training loss, with the step's own generator, and nothing else."""
    from pvdm_fast.models import Autoencoder
    from pvdm_fast.training.config import make_config
    from pvdm_fast.training.stages import AutoencoderStage

    sizes = dict(frames=2, height=8, width=8, patch_size=4, channels=16, depth=1, num_heads=1, head_dim=8)
    model, video = Autoencoder(**sizes), torch.rand(2, 3, 2, 8, 8)

    def loss(noise: float, seed: int) -> float:
        stage = AutoencoderStage(make_config({"autoencoder.latent_noise": noise}), model)
        return stage.loss(model, video, torch.Generator().manual_seed(seed)).item()

    assert loss(0.0, 1) == loss(0.0, 2)
    assert loss(0.5, 1) == loss(0.5, 1)
    assert len({loss(0.0, 1), loss(0.5, 1), loss(0.5, 2)}) == 3


def test_the_autoencoders_losses_of_a_known_error() -> None:
    """With an error of 0.5 everywhere: 4 x 0.5 and 16 x 0.25."""
    from pvdm_fast.models import Autoencoder
    from pvdm_fast.training.config import make_config
    from pvdm_fast.training.stages import AutoencoderStage

    sizes = dict(frames=2, height=8, width=8, patch_size=4, channels=16, depth=1, num_heads=1, head_dim=8)
    model, video = Autoencoder(**sizes), torch.rand(2, 3, 2, 8, 8)
    for name, expected in (("l1", 2.0), ("l2", 4.0)):
        stage = AutoencoderStage(make_config({"autoencoder.loss": name, "autoencoder.latent_noise": 0.0}), model)
        loss = stage.loss(lambda clip, noise: SimpleNamespace(sample=clip + 0.5), video, torch.Generator())  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(expected)

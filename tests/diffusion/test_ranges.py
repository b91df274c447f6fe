"""Numbers and values that no model was trained for give one sentence, never a video of one colour."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvdm_fast.diffusion.pipeline import PVDMPipeline
from pvdm_fast.diffusion.sampling import NoiseSource, sample_video
from pvdm_fast.diffusion.schedulers import make_scheduler
from pvdm_fast.errors import UserError
from pvdm_fast.evaluation import protocol
from pvdm_fast.models import Autoencoder, Denoiser

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def models() -> tuple[Autoencoder, Denoiser]:
    torch.manual_seed(0)
    size = dict(frames=2, height=8, width=8, patch_size=4, channels=8, num_heads=1, head_dim=8)
    return (
        Autoencoder.from_preset("tiny", latent_channels=4, **size).eval(),
        Denoiser.from_preset(
            "tiny", time=2, height=2, width=2, latent_channels=4, model_channels=32, prediction="v"
        ).eval(),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        *({"eta": value} for value in (NAN, INF, -0.1, 1.1, "x", None, True, 10**400)),
        *({"guidance": value} for value in (NAN, INF, -INF, -1, 1e30, "x")),
        *({"steps": value} for value in (0, -1, 1001, 2.5, NAN, True, "x")),
        *({"clips": value} for value in (0, -1, 10**12, 1.5, None)),
        *({"frames": value} for value in (0, -1, 10**12, 1.5, NAN)),
        *({"seed": value} for value in (-1, 2**64, 1.5, NAN, None, "x")),
    ],
    ids=str,
)
def test_sampling_refuses_other_numbers(models: tuple[Autoencoder, Denoiser], wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        sample_video(*models, **{"clips": 1, "frames": 2, "steps": 1, **wrong})


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm++", "unipc"])
def test_eta_belongs_to_ddim(models: tuple[Autoencoder, Denoiser], scheduler: str) -> None:
    """Other samplers would pass over it."""
    with pytest.raises(UserError, match=f"DDIM's share of new noise, and {re.escape(scheduler)} has none"):
        sample_video(*models, clips=1, frames=2, steps=1, scheduler=scheduler, eta=0.5)
    with pytest.raises(UserError, match="take ddim"):
        protocol.Request(run=Path("run"), data="clips", scheduler=scheduler, eta=0.0)


def test_the_ends_of_the_ranges_give_finite_videos(models: tuple[Autoencoder, Denoiser]) -> None:
    for right in ({"eta": 0}, {"eta": 1.0}, {"guidance": 1000.0}, {"seed": 2**63 - 1}, {"steps": np.int64(2)}):
        video = sample_video(*models, **{"clips": 1, "frames": 4, "steps": 2, **right})
        assert video.shape == (1, 3, 4, 8, 8) and bool(video.isfinite().all()) and float(video.std()) > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_frames": 0}, {"num_frames": NAN}, {"num_inference_steps": 0}, {"num_inference_steps": 2.5},
        {"guidance_scale": NAN}, {"guidance_scale": INF}, {"eta": NAN}, {"batch_size": 0},
    ],
    ids=str,
)  # fmt: skip
def test_the_pipeline_refuses_them_too(models: tuple[Autoencoder, Denoiser], wrong: dict[str, Any]) -> None:
    pipeline = PVDMPipeline(*models, scheduler=make_scheduler("ddim"))
    with pytest.raises(UserError, match="must be"):
        pipeline(**{"num_inference_steps": 1, **wrong})


def test_conditions_of_8_bits_are_refused(models: tuple[Autoencoder, Denoiser]) -> None:
    pipeline = PVDMPipeline(*models, scheduler=make_scheduler("ddim"))
    film = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    assert pipeline(num_inference_steps=1, condition=film / 255.0).frames.shape == (1, 2, 8, 8, 3)
    for wrong in (film, film.astype(np.float32), np.full((2, 8, 8, 3), NAN)):
        with pytest.raises(UserError, match="the condition"):
            pipeline(num_inference_steps=1, condition=wrong)
    clip = torch.zeros(1, 3, 2, 8, 8)
    for video in (clip + 255, clip + NAN, clip.to(torch.uint8)):
        with pytest.raises(UserError, match=r"the condition must be a video in \[-1, 1\]"):
            sample_video(*models, clips=1, frames=2, steps=1, condition=video)


@pytest.mark.parametrize("time", [-1, 1000, 10**9, NAN, torch.tensor([-1]), torch.tensor([3, 1000])], ids=str)
@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_times_out_of_range(time: Any, prediction: str) -> None:
    denoiser = Denoiser.from_preset(
        "tiny", time=2, height=2, width=2, latent_channels=4, model_channels=32, prediction=prediction
    )
    latent = torch.zeros(2, 4, denoiser.layout.num_tokens)
    assert denoiser(latent, 999).sample.isfinite().all() and denoiser(latent, torch.tensor([0, 999])).sample is not None
    with pytest.raises(ValueError, match="timestep must be from 0 to 999"):
        denoiser(latent, time)


def test_videos_of_8_bits(models: tuple[Autoencoder, Denoiser]) -> None:
    video = torch.rand(1, 3, 2, 8, 8) * 2 - 1
    assert models[0].encode(video).latent.isfinite().all()
    for wrong in (video * 127.5 + 127.5, (video * 127.5 + 127.5).to(torch.uint8)):
        with pytest.raises(ValueError, match=r"video must be .*\[-1, 1\]"):
            models[0].encode(wrong)


def test_the_scheduler_alone() -> None:
    scheduler = make_scheduler("ddim")
    scheduler.set_timesteps(10)
    latent = torch.zeros(1, 2)
    with pytest.raises(UserError, match="5 isn't one of this scheduler's times"):
        scheduler.step(latent, 5, latent)
    with pytest.raises(UserError, match="eta must be"):
        scheduler.step(latent, int(scheduler.timesteps[0]), latent, eta=NAN)
    with pytest.raises(UserError, match="must be at most 1000"):
        scheduler.set_timesteps(1001)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++", "unipc"])
def test_samples_don_t_depend_on_the_default_dtype(name: str, models: tuple[Autoencoder, Denoiser]) -> None:
    options: dict[str, Any] = dict(clips=1, frames=4, steps=3, scheduler=name)
    expected = sample_video(*models, **options)
    torch.set_default_dtype(torch.float64)
    try:
        video = sample_video(*models, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert video.dtype == torch.float32
    # tables in the default dtype would be rounded differently
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-6)


def test_noise_is_float32_whatever_the_default_is() -> None:
    expected = NoiseSource(3)((2, 5))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(NoiseSource(3)((2, 5)), expected)
    finally:
        torch.set_default_dtype(torch.float32)

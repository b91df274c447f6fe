"""Sampling: noise to latents, latents to video, and long videos clip after clip."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdm_fast.errors import UserError

if TYPE_CHECKING:
    from pvdm_fast.models import Autoencoder, Denoiser

Progress = Callable[[int, int], None]


class NoiseSource:
    """Standard normal noise drawn on the CPU, so that a seed means the same noise on every device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """A float32 CPU tensor of the given shape."""
        return torch.randn(tuple(shape), generator=self.generator)


def predict_noise(
    denoiser: Denoiser, latent: Tensor, timestep: int | Tensor, condition: Tensor | None = None, guidance: float = 0.0
) -> Tensor:
    """Predicted noise (B, D, N), in the denoiser's dtype.

    With guidance w it is (1 + w) eps(condition) - w eps(zeros), in one batched pass.
    """
    batch, latent = latent.shape[0], latent.to(next(denoiser.parameters()).dtype)
    times = timestep
    if not isinstance(times, Tensor):
        times = torch.full((batch,), times, dtype=torch.long, device=latent.device)
    if condition is None or guidance == 0:
        return denoiser(latent, times, condition=condition).sample
    both = torch.cat([condition, torch.zeros_like(condition)])
    predicted = denoiser(latent.repeat(2, 1, 1), times.repeat(2), condition=both).sample
    conditional, unconditional = predicted.chunk(2)
    return (1 + guidance) * conditional - guidance * unconditional


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    scheduler: Any,
    shape: Sequence[int],
    *,
    steps: int,
    noise: NoiseSource,
    condition: Tensor | None = None,
    guidance: float = 0.0,
    eta: float = 1.0,
    predict: Callable[..., Tensor] = predict_noise,
    progress: Progress | None = None,
) -> Tensor:
    """Denoise latents from pure noise.

    Args:
        denoiser: predicts noise; put it into eval mode first.
        scheduler: from :func:`pvdm_fast.schedulers.make_scheduler`.
        shape: (B, D, N) of the latents.
        steps: number of denoising steps, 1 to 1000.
        noise: where the starting noise and that of each step come from.
        condition: latents (B, D, N) of the clips before, or None.
        guidance: weight w of :func:`predict_noise`; without a condition it changes nothing.
        eta: DDIM only: 0 adds no noise, 1 as much as the DDPM posterior.
        predict: what predicts the noise, with the arguments of :func:`predict_noise`.
        progress: called as ``progress(steps done, steps)``.

    Returns:
        (B, D, N) float32 on the denoiser's device.
    """
    device = next(denoiser.parameters()).device
    scheduler.set_timesteps(steps, device=device)
    latent = noise(shape).to(device)
    for done, timestep in enumerate(scheduler.timesteps.tolist(), start=1):
        predicted = predict(denoiser, latent, timestep, condition, guidance).float()
        latent = _scheduler_step(scheduler, predicted, timestep, latent, noise, eta)
        if progress is not None:
            progress(done, steps)
    return latent


def _scheduler_step(
    scheduler: Any, predicted: Tensor, timestep: int, latent: Tensor, noise: NoiseSource, eta: float
) -> Tensor:
    """One step of whichever scheduler this is, all its randomness taken from ``noise``."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if isinstance(scheduler, DDIMScheduler):
        draws = eta > 0 and scheduler.next_time(timestep) >= 0
        extra = noise(latent.shape).to(latent.device) if draws else None
        return scheduler.step(predicted, timestep, latent, eta=eta, variance_noise=extra).prev_sample
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        level = scheduler.alphas_cumprod[timestep].item()
        clean = ((latent - (1 - level) ** 0.5 * predicted) / level**0.5).clamp(-1, 1)
        return scheduler.step(clean, timestep, latent).prev_sample
    return scheduler.step(predicted, timestep, latent, generator=noise.generator).prev_sample


@torch.no_grad()
def sample_video(
    autoencoder: Autoencoder,
    denoiser: Denoiser,
    *,
    clips: int,
    frames: int,
    steps: int = 50,
    scheduler: str = "ddim",
    guidance: float = 0.0,
    eta: float = 1.0,
    seed: int = 0,
    cuda_graph: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Videos of any length: the model's clips one after the other, each conditioned on the latent of the one before.

    Args:
        autoencoder, denoiser: a matching pair, on one device.
        clips: number of videos B.
        frames: their length; the last clip is cut to fit.
        steps, guidance, eta: as for :func:`sample_latents`; the first clip has no condition.
        scheduler: "ddim", "ddpm" or "dpm++".
        seed: decides everything: the same seed gives the same videos on the same machine.
        cuda_graph: capture the denoiser's pass as a CUDA graph and replay it in every step. Not yet run on a GPU.
        progress: called as ``progress(steps done, steps in all)``.

    Returns:
        (B, 3, frames, H, W) float32 in [-1, 1], on the CPU.

    Raises:
        UserError: the two models don't belong together, or a number is out of range; a CUDA graph without a GPU.
    """
    from pvdm_fast.cuda_graph import graphed_prediction
    from pvdm_fast.schedulers import make_scheduler

    check_pair(autoencoder, denoiser)
    if clips < 1 or frames < 1:
        raise UserError(f"clips and frames must be at least 1, not {clips} and {frames}")
    predict = graphed_prediction(denoiser) if cuda_graph else predict_noise
    layout = denoiser.layout
    shape = (clips, int(denoiser.config["latent_channels"]), layout.num_tokens)
    rounds = math.ceil(frames / layout.time)
    sampler, noise = make_scheduler(scheduler), NoiseSource(seed)
    latent: Tensor | None = None
    videos = []
    for index in range(rounds):

        def report(done: int, total: int, before: int = index * steps) -> None:
            if progress is not None:
                progress(before + done, rounds * total)

        latent = sample_latents(
            denoiser,
            sampler,
            shape,
            steps=steps,
            noise=noise,
            condition=latent,
            guidance=guidance,
            eta=eta,
            predict=predict,
            progress=report,
        )
        videos.append(autoencoder.decode(latent.to(autoencoder.dtype)).sample.float().cpu())
    return torch.cat(videos, dim=2)[:, :, :frames]


def check_pair(autoencoder: Autoencoder, denoiser: Denoiser) -> None:
    """Raises UserError unless the denoiser was made for the autoencoder's latents."""
    for what, have, want in (
        ("layout", denoiser.layout, autoencoder.layout),
        ("latent channels", denoiser.config["latent_channels"], autoencoder.config["latent_channels"]),
    ):
        if have != want:
            raise UserError(
                f"the denoiser's {what} ({have}) differ from the autoencoder's ({want}): "
                "use two models that were trained together"
            )

"""What the diffusion model learns: its loss, and the targets and conditions of training batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.diffusion.flow import interpolate
from pvdm_fast.jobs.share import Share
from pvdm_fast.jobs.transfer import to_device
from pvdm_fast.models.noise_schedule import TRAIN_STEPS, NoiseSchedule

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023


def diffusion_loss(
    denoiser: Callable[..., object],
    schedule: NoiseSchedule,
    target: Tensor,
    condition: Tensor,
    noise: Tensor,
    timestep: Tensor,
    prediction: str = "noise",
    loss_weight: str = "none",
) -> Tensor:
    """Mean squared error of the predicted noise, of v or of the velocity, a float32 scalar.

    Args:
        denoiser: called as ``denoiser(noisy, timestep, condition=condition).sample``.
        target: clean latents (B, D, N).
        condition: latents of the preceding clips (B, D, N), or zeros if there is none.
        noise: standard normal (B, D, N).
        timestep: (B,) int64 in [0, 1000); for "flow" 1000 t with t in [0, 1].
        prediction: "noise", "v" or "flow". With "v" it is the error of v = sqrt(a) noise - sqrt(1 - a) latent, where v
            follows from the predicted noise. That is the noise's error divided by sqrt(a). With "flow" it is the error
            of the velocity noise - latent (`pvdm_fast.diffusion.flow`), which needs no schedule.
        loss_weight: "none", or "min_snr" for "noise" and "v": the error of the clean latent times min(snr, 5), where
            snr = a / (1 - a) (Hang et al. 2023). It is the same for both.
    """
    if prediction == "flow":
        noisy = interpolate(target, noise, timestep / TRAIN_STEPS)
        velocity: Tensor = denoiser(noisy, timestep, condition=condition).sample  # type: ignore[attr-defined]
        return F.mse_loss(velocity.float(), noise.float() - target.float())
    noisy = schedule.q_sample(target, noise, timestep)
    predicted: Tensor = denoiser(noisy, timestep, condition=condition).sample  # type: ignore[attr-defined]
    if prediction == "noise" and loss_weight == "none":
        return F.mse_loss(predicted.float(), noise.float())
    error = (predicted.float() - noise.float()).square().flatten(1).mean(1)
    level = schedule.alphas_cumprod[timestep]
    if loss_weight == "min_snr":
        snr = level / (1 - level)  # the clean latent's error is the noise's over snr
        return (error * snr.clamp(max=MIN_SNR_GAMMA) / snr).mean()
    return (error / level).mean()


def joint_batch(
    video: Tensor,
    encode: Callable[[Tensor], Tensor],
    conditional_probability: float,
    generator: torch.Generator,
    share: Share = Share(),  # noqa: B008
    *,
    per_batch: bool = False,
    pad_short: bool = False,
) -> tuple[Tensor, Tensor]:
    """Targets and conditions for joint unconditional and conditional training.

    With the given probability, a clip of 2T frames is split into condition (first T frames) and target (last T).
    Otherwise the target is a random window of T frames, and the condition is zeros.

    Args:
        video: (B, 3, 2T, H, W), whatever ``encode`` takes.
        encode: maps videos (b, 3, T, H, W) to latents (b, D, N).
        conditional_probability: between 0 and 1.
        generator: a CPU generator, the only source of randomness.
        share: which clips of a global batch ``video`` holds.
        per_batch: draw once for the whole global batch, whether there is a condition and where targets begin.
        pad_short: the first T frames of a clip may be padding, all black: -1, or 0 where ``video`` is uint8. Then the
            target is the last T frames, and the condition zeros.

    Returns:
        target and condition, both (B, D, N).

    Raises:
        ValueError: if the number of frames is odd.
    """
    batch, _, frames = video.shape[:3]
    if frames % 2:
        raise ValueError(f"joint training needs clips of 2T frames, but these have {frames}")
    half = frames // 2
    conditional, starts = _draw_targets(batch, half, conditional_probability, generator, share, per_batch)
    windows = [clip[:, start : start + half] for clip, start in zip(video, starts.tolist(), strict=True)]
    shown = _shown(video[:, :, :half]) if pad_short else None
    if shown is not None:
        windows = [torch.where(seen, w, clip[:, half:]) for seen, w, clip in zip(shown, windows, video, strict=True)]
    preceding = [clip[:, :half] for clip, keep in zip(video, conditional.tolist(), strict=True) if keep]
    latents = encode(torch.stack(windows + preceding))
    target, nothing, of_preceding = latents[:batch], torch.zeros_like(latents[0]), iter(latents[batch:])
    # Not by a mask on the device: how many are set would have to be waited for.
    condition = torch.stack([next(of_preceding) if keep else nothing for keep in conditional.tolist()])
    return target, condition if shown is None else torch.where(shown[:, None, None], condition, 0.0)


def _shown(frames: Tensor) -> Tensor:
    """Which clips (B, 3, T, H, W) aren't black in every frame: bool (B,)."""
    return (frames != (0 if frames.dtype == torch.uint8 else -1)).flatten(1).any(1)


def joint_latents(
    latents: Tensor,
    frames: int,
    conditional_probability: float,
    generator: torch.Generator,
    share: Share = Share(),  # noqa: B008
    *,
    per_batch: bool = False,
) -> tuple[Tensor, Tensor]:
    """`joint_batch` from cached latents: the same draws, each with the nearest cached window.

    Args:
        latents: (B, W, D, N), each clip of 2T frames encoded at the W >= 2 windows of `window_starts`.
        frames: T.
        conditional_probability, generator, share, per_batch: as for `joint_batch`. With W = T + 1 the result is
            the same.

    Returns:
        target and condition, both (B, D, N).
    """
    conditional, starts = _draw_targets(len(latents), frames, conditional_probability, generator, share, per_batch)
    cached = torch.tensor(window_starts(frames, latents.shape[1]))
    nearest = (starts[:, None] - cached).abs().argmin(1)
    nearest, keep = to_device([nearest, conditional.to(latents.dtype)], latents.device)
    target = latents[torch.arange(len(latents), device=latents.device), nearest]
    return target, latents[:, 0] * keep[:, None, None]


def window_starts(frames: int, windows: int) -> list[int]:
    """First frames of ``windows`` windows of ``frames`` frames, spread evenly over a clip of twice as many."""
    return [round(index * frames / (windows - 1)) for index in range(windows)]


def _draw_targets(
    batch: int, half: int, conditional_probability: float, generator: torch.Generator, share: Share, per_batch: bool
) -> tuple[Tensor, Tensor]:
    """Which clips have a condition, and where in the 2T frames each target begins: bool and int64 (B,)."""
    clips = share.world * batch
    drawn = 1 if per_batch else clips
    conditional = torch.rand(drawn, generator=generator) < conditional_probability
    starts = torch.randint(0, half + 1, (drawn,), generator=generator)
    conditional, starts = share.of(conditional.expand(clips)), share.of(starts.expand(clips))
    return conditional, torch.where(conditional, half, starts)

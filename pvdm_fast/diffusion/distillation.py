"""Distils a rectified flow into few steps. The times from noise to latent are cut into K windows, one a step.

Piecewise rectified flow (PeRFlow, Yan et al. 2024): in each window the student learns the straight line between the two
points at which the teacher's path enters and leaves it. Its K Euler steps then end where the teacher's many steps do.

Distribution matching (DMD2, Yin et al. 2024): the clean latents that the student predicts at each of its own steps are
to be distributed as the teacher's. A critic, a flow that learns the student's samples, knows how they are distributed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.diffusion.flow import interpolate, shifted
from pvdm_fast.models.noise_schedule import TRAIN_STEPS

SMALLEST_SCALE = 1e-3  # of latents, whose deviation is about 1

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Maps a latent (B, D, N) and times (B,) in [0, 1] to noise - latent (B, D, N), as expected there."""


def window_ends(window: Tensor, windows: int, shift: float, pieces: int = 1) -> Tensor:
    """The times (pieces + 1, B) in float32 from the start to the end of each window (B,), 0 being that of the noise.

    They are those of `pvdm_fast.diffusion.flow.sampling_times` for windows x pieces steps.
    """
    part = torch.arange(pieces + 1, device=window.device, dtype=torch.float64)[:, None] / pieces
    return shifted(1 - (window + part) / windows, shift).float()


def follow(velocity: Velocity, latent: Tensor, times: Tensor, *, euler: bool = False) -> Tensor:
    """Where the path through ``latent`` (B, D, N) at ``times[0]`` is at ``times[-1]``, float32.

    Args:
        times: (steps + 1, B), falling.
        euler: take Euler's method, one pass a step, and not Heun's, two passes of second order.
    """
    latent = latent.float()
    for start, end in itertools.pairwise(times):
        step = (end - start).view(-1, 1, 1)
        slope = velocity(latent, start).float()
        if not euler:
            slope = (slope + velocity(latent + step * slope, end).float()) / 2
        latent = latent + step * slope
    return latent


def distillation_loss(
    student: Velocity,
    teacher: Velocity,
    target: Tensor,
    noise: Tensor,
    window: Tensor,
    *,
    windows: int,
    shift: float,
    solver_steps: int,
    euler: bool = False,
) -> Tensor:
    """Mean squared error of the student's velocity at the start of a window, a float32 scalar.

    The right one is the mean velocity along the teacher's path through the window.

    Args:
        student, teacher: see `Velocity`. Only the student's gradient is taken.
        target: clean latents (B, D, N).
        noise: standard normal (B, D, N).
        window: (B,) int64 in [0, windows), 0 being that of the noise.
        shift: of the times, as in sampling.
        solver_steps: the teacher's steps in a window.
        euler: as of `follow`: for a teacher that was distilled itself, and takes Euler steps.
    """
    times = window_ends(window, windows, shift, solver_steps)
    start, end = times[0], times[-1]
    latent = interpolate(target, noise, start)
    with torch.no_grad():
        mean = (follow(teacher, latent, times, euler=euler) - latent) / (end - start).view(-1, 1, 1)
    return F.mse_loss(student(latent, start).float(), mean)


def predicted_latent(latent: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """The clean latent (B, D, N) in float32 that a velocity at ``time`` (B,) stands for."""
    return latent.float() - time.view(-1, 1, 1) * velocity.float()


def matching_gradient(
    teacher: Velocity, critic: Velocity, sample: Tensor, noise: Tensor, time: Tensor
) -> tuple[Tensor, Tensor]:
    """The direction in which samples become less likely for the teacher than for the critic, and the critic's error.

    From the noisy samples, critic and teacher predict clean latents. Their difference is proportional to the gradient
    of the Kullback-Leibler divergence between both distributions at that noise (Yin et al. 2024, DMD). Each clip's is
    divided by the mean absolute distance of the teacher's prediction from the sample, as there.

    Args:
        teacher, critic: see `Velocity`. No gradient is taken of them.
        sample: what the student predicts (B, D, N).
        noise: standard normal (B, D, N).
        time: (B,) in (0, 1).

    Returns:
        The gradient (B, D, N) at the samples, and the critic's mean squared error, a scalar. Both are float32.
    """
    sample = sample.detach().float()
    latent = interpolate(sample, noise, time)
    with torch.no_grad():
        wanted, found = teacher(latent, time).float(), critic(latent, time).float()
        right = predicted_latent(latent, wanted, time)
        difference = predicted_latent(latent, found, time) - right
        scale = (sample - right).abs().mean((1, 2), keepdim=True)
        return difference / scale.clamp_min(SMALLEST_SCALE), F.mse_loss(found, noise - sample)


def network_times(times: Tensor) -> Tensor:
    """Times in [0, 1] as a denoiser takes them."""
    return TRAIN_STEPS * times

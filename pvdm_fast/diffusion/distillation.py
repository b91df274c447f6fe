"""Distils a rectified flow into few steps, by piecewise rectified flow (PeRFlow, Yan et al. 2024).

The times from noise to latent are cut into K windows. In each, the student learns the straight line between the two
points at which the teacher's path enters and leaves it. Its K Euler steps then end where the teacher's many steps do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.diffusion.flow import interpolate, shifted
from pvdm_fast.models.noise_schedule import TRAIN_STEPS

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


def network_times(times: Tensor) -> Tensor:
    """Times in [0, 1] as a denoiser takes them."""
    return TRAIN_STEPS * times

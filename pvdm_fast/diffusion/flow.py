"""Rectified flow: the straight path from a latent to noise, and the times at which it is learned.

Lipman et al. 2023 and Liu et al. 2023. The distribution of the times is that of Esser et al. 2024 (Stable Diffusion 3).
"""

from __future__ import annotations

import torch
from torch import Tensor


def shifted(time: Tensor, shift: float) -> Tensor:
    """Times moved towards the noise: shift t / (1 + (shift - 1) t). 0, 1 and, for shift 1, all times stay."""
    return shift * time / (1 + (shift - 1) * time)


def logit_normal_times(normal: Tensor, mean: float, std: float, shift: float) -> Tensor:
    """Training times in (0, 1) from standard normal numbers of the same shape: sigmoid(mean + std normal), shifted."""
    return shifted(torch.sigmoid(mean + std * normal), shift)


def sampling_times(steps: int, shift: float) -> Tensor:
    """The times (steps + 1,) that samplers visit, float64: even from 1 to 0, then shifted."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def interpolate(latent: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """The point of the path at ``time`` (B,) in [0, 1]: (1 - t) latent + t noise, all else (B, D, N).

    Its velocity, which the denoiser learns, is noise - latent at every time.
    """
    time = time.view(-1, 1, 1)
    return (1 - time) * latent + time * noise

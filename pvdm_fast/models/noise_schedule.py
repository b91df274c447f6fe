"""The noise levels that PVDM's denoiser is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAIN_STEPS = 1000
BETA_START = 0.0015
BETA_END = 0.0195


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The release's 1000 noise levels; ``betas`` and ``alphas_cumprod`` are float32 tensors of shape (1000,)."""

    betas: Tensor
    alphas_cumprod: Tensor

    @staticmethod
    def create(device: torch.device | str = "cpu") -> NoiseSchedule:
        """Betas are linspace(sqrt(0.0015), sqrt(0.0195), 1000) squared, computed in float64 and rounded once."""
        betas = np.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS) ** 2
        alphas_cumprod = np.cumprod(1 - betas)
        return NoiseSchedule(
            torch.tensor(betas, dtype=torch.float32, device=device),
            torch.tensor(alphas_cumprod, dtype=torch.float32, device=device),
        )

    def q_sample(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The latent (B, D, N) at noise level ``timestep`` (B,) int64: sqrt(a) latent + sqrt(1 - a) noise."""
        level = self.alphas_cumprod[timestep].view(-1, 1, 1)
        return level.sqrt() * latent + (1 - level).sqrt() * noise

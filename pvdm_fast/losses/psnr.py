"""How near a reconstruction comes to its video, in decibels."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip: both (B, ...) with values in [-1, 1] (peak 2); returns (B,)."""
    error = (reconstruction.float() - video.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)

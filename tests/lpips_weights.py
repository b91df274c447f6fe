"""Random weights in the form of LPIPS's files, because a test can't download the trained ones."""

from __future__ import annotations

import torch
from torch import Tensor

# VGG16's convolutions by torchvision's numbers, with their widths. And the layers after which LPIPS looks.
CONVOLUTIONS = dict(
    zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6, strict=True)
)
SLICE_ENDS = (3, 8, 15, 22, 29)


def random_backbone() -> dict[str, Tensor]:
    """VGG16 by torchvision's names, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(0)
    state, channels = {}, 3
    for number, width in CONVOLUTIONS.items():
        spread = (2 / (9 * channels)) ** 0.5
        state[f"features.{number}.weight"] = spread * torch.randn(width, channels, 3, 3, generator=generator)
        state[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
        channels = width
    return state


def random_heads() -> dict[str, Tensor]:
    """By the names of the package lpips."""
    generator = torch.Generator().manual_seed(1)
    widths = (64, 128, 256, 512, 512)
    return {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for i, w in enumerate(widths)}

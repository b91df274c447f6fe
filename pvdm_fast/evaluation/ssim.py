"""Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004) of videos, per frame and colour."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(first: Tensor, second: Tensor, data_range: float = 2.0) -> Tensor:
    """Mean structural similarity of each clip, computed in float64.

    The Gaussian window has 11 pixels and sigma 1.5, and stays inside the frame (no padding). Variances divide by the
    number of pixels, as in the paper.

    Args:
        first, second: (B, C, T, H, W), with values at most ``data_range`` apart. H and W are at least 11.

    Returns:
        (B,) float64.

    Raises:
        ValueError: the shapes differ, or frames are smaller than the window.
    """
    if first.shape != second.shape:
        raise ValueError(f"expected two videos of one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    if min(first.shape[-2:]) < WINDOW:
        raise ValueError(f"the window of SSIM needs frames of {WINDOW} x {WINDOW} at least, got {first.shape[-2:]}")
    x, y = first.double(), second.double()
    down, right = _blur_matrix(x.shape[-2], x.device), _blur_matrix(x.shape[-1], x.device)

    def blur(values: Tensor) -> Tensor:
        return down @ values @ right.T

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _blur_matrix(size: int, device: torch.device) -> Tensor:
    """(size - 10, size) float64: each row is the window at one place, so a product blurs an axis."""
    places = torch.arange(WINDOW, dtype=torch.float64, device=device) - WINDOW // 2
    window = torch.exp(-0.5 * (places / SIGMA) ** 2)
    rows = size - WINDOW + 1
    matrix = torch.zeros(rows, size, dtype=torch.float64, device=device)
    for offset, weight in enumerate(window / window.sum()):
        matrix.diagonal(offset).copy_(weight.expand(rows))
    return matrix

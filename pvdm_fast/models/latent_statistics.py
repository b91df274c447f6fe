"""Mean and standard deviation of the latents by plane and channel: a denoiser of flow can see them normalised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pvdm_fast.layout import PlaneLayout
from pvdm_fast.nn.constants import constant

if TYPE_CHECKING:
    from pvdm_fast.models.denoiser import Denoiser

# Of a channel that hardly varies: tanh holds some at 1 nearly always (standard deviation 0.04 in a tiny model), and
# their rare other values would become dozens.
LEAST_STD = 0.1

ByPlane = list[list[float]]


def measure(latents: Iterable[Tensor], layout: PlaneLayout) -> tuple[ByPlane, ByPlane]:
    """Mean and standard deviation of latents (B, D, N), each [plane][channel], summed in float64.

    A standard deviation is at least LEAST_STD.
    """
    sums = torch.zeros(3, len(layout.planes), 1, dtype=torch.float64)
    for batch in latents:
        planes = [plane.flatten(2).double().cpu().transpose(0, 1).flatten(1) for plane in layout.split(batch, dim=2)]
        powers = [torch.stack([torch.ones_like(plane), plane, plane.square()]).sum(2) for plane in planes]
        sums = sums + torch.stack(powers, dim=1)
    count, first, second = sums
    mean = first / count
    std = (second / count - mean.square()).clamp_min(0).sqrt().clamp_min(LEAST_STD)
    return mean.tolist(), std.tolist()


def check(mean: Sequence[Sequence[float]], std: Sequence[Sequence[float]], planes: int, channels: int) -> None:
    """Raises ValueError unless both are [plane][channel] and every standard deviation is above 0."""
    for name, values in (("latent_mean", mean), ("latent_std", std)):
        if [len(plane) for plane in values] != [channels] * planes:
            raise ValueError(f"{name} must hold {planes} lists, one for each plane, of {channels} channels each.")
    if not all(value > 0 for plane in std for value in plane):
        raise ValueError("latent_std must be above 0.")


def normalized(latent: Tensor, denoiser: Denoiser) -> Tensor:
    """An autoencoder's latent (..., D, N) as this denoiser sees it. The same tensor, if the denoiser has no statistics.

    Differentiable in ``latent``.
    """
    if denoiser.config.get("latent_mean") is None:
        return latent
    mean, std = _statistics(denoiser, latent)
    return (latent - mean) / std


def restored(latent: Tensor, denoiser: Denoiser) -> Tensor:
    """The inverse of `normalized`: a latent (..., D, N) of the denoiser as the autoencoder decodes it."""
    if denoiser.config.get("latent_mean") is None:
        return latent
    mean, std = _statistics(denoiser, latent)
    return latent * std + mean


def _statistics(denoiser: Denoiser, like: Tensor) -> Tensor:
    """Mean and standard deviation of each token, (2, D, N) float32 on the latent's device, made once."""
    tokens = tuple(rows * columns for rows, columns in denoiser.layout.planes)
    values = tuple(tuple(map(tuple, denoiser.config[name])) for name in ("latent_mean", "latent_std"))
    return constant(_of_tokens, like, torch.float32, tokens, values)


def _of_tokens(
    tokens: tuple[int, ...],
    values: tuple[tuple[tuple[float, ...], ...], ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    by_plane = torch.tensor(values, dtype=dtype).transpose(1, 2)  # (2, D, planes)
    return by_plane.repeat_interleave(torch.tensor(tokens), dim=2).to(device)

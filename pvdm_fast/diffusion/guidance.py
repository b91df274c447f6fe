"""One prediction of the denoiser in sampling, with classifier-free guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pvdm_fast.models import Denoiser


def guided_prediction(
    denoiser: Denoiser,
    latent: Tensor,
    timestep: float | Tensor,
    condition: Tensor | None = None,
    guidance: float = 0.0,
    labels: Tensor | None = None,
) -> Tensor:
    """What the denoiser predicts (B, D, N), noise or velocity, in the denoiser's dtype.

    With guidance w it is (1 + w) f(condition, labels) - w f(zeros, no label), in one batched pass (Ho and Salimans
    2022). Velocities are guided as noise is: at one time and latent they are the noise times a factor plus a constant.
    """
    batch, latent = latent.shape[0], latent.to(next(denoiser.parameters()).dtype)
    times = timestep if isinstance(timestep, Tensor) else times_of(timestep, batch, latent.device)
    if guidance == 0 or (condition is None and labels is None):
        return denoiser(latent, times, condition=condition, **_labelled(labels)).sample
    if condition is not None:
        condition = torch.cat([condition, torch.zeros_like(condition)])
    if labels is not None:
        labels = torch.cat([labels, torch.full_like(labels, int(denoiser.config["num_classes"]))])
    predicted = denoiser(latent.repeat(2, 1, 1), times.repeat(2), condition=condition, **_labelled(labels)).sample
    conditional, unconditional = predicted.chunk(2)
    return (1 + guidance) * conditional - guidance * unconditional


def times_of(timestep: float, batch: int, device: torch.device) -> Tensor:
    """One time for a whole batch (B,): int64, or float32 if it is no int, as the times of a flow."""
    return torch.full(
        (batch,), timestep, dtype=torch.long if isinstance(timestep, int) else torch.float32, device=device
    )


def _labelled(labels: Tensor | None) -> dict[str, Tensor]:
    return {} if labels is None else {"class_labels": labels}

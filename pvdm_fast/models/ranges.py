"""Refuses values that no network was trained for, if they can be read without waiting for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.models.noise_schedule import TRAIN_STEPS

LARGEST_PIXEL = 8.0  # far outside [-1, 1], and below what 8 bits hold


def _seen(tensor: Tensor) -> bool:
    """Whether values can be read: on the CPU, not traced, and not shapes alone."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _any(condition: Tensor) -> bool:
    try:
        return bool(condition.any())
    except RuntimeError:  # inside vmap
        return False


def check_timestep(timestep: Tensor | float, with_end: bool = False) -> None:
    """Raises ValueError for times that are not in [0, 1000), or in [0, 1000] ``with_end``."""
    values = torch.as_tensor(timestep)
    if _seen(values) and _any(~((values >= 0) & ((values <= TRAIN_STEPS) if with_end else (values < TRAIN_STEPS)))):
        last = TRAIN_STEPS if with_end else TRAIN_STEPS - 1
        raise ValueError(f"timestep must be from 0 to {last}, but is {str(values.tolist())[:60]}.")


def check_pixels(video: Tensor) -> None:
    """Raises ValueError for a video whose values are those of 8 bits, not of [-1, 1]."""
    if not video.is_floating_point():
        raise ValueError(f"video must be floating point in [-1, 1], but is {video.dtype}: divide by 127.5, subtract 1.")
    if _seen(video) and _any(video.detach().abs() > LARGEST_PIXEL):
        raise ValueError(
            f"video must be in [-1, 1], but reaches {video.detach().abs().max().item():.3g}: divide 8-bit values by "
            "127.5, and subtract 1."
        )

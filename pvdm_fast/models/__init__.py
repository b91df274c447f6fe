"""PVDM's two networks, saved and loaded as diffusers models."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvdm_fast.models.autoencoder import Autoencoder, AutoencoderOutput, EncoderOutput
    from pvdm_fast.models.denoiser import Denoiser, DenoiserOutput

__all__ = ["Autoencoder", "AutoencoderOutput", "Denoiser", "DenoiserOutput", "EncoderOutput"]

# Imported on first use: `train --help` shows the sizes in `presets`, and diffusers takes seconds.
_HOME = {
    "Autoencoder": "autoencoder",
    "AutoencoderOutput": "autoencoder",
    "EncoderOutput": "autoencoder",
    "Denoiser": "denoiser",
    "DenoiserOutput": "denoiser",
}

# diffusers warns at every cast of a model that `[]` should stay float32, which means nothing.
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "should be kept in float32: []" not in record.getMessage()
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

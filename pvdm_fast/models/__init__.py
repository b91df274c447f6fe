"""PVDM's two networks, saved and loaded as diffusers models."""

import logging

from pvdm_fast.models.autoencoder import Autoencoder, AutoencoderOutput, EncoderOutput
from pvdm_fast.models.denoiser import Denoiser, DenoiserOutput

__all__ = ["Autoencoder", "AutoencoderOutput", "Denoiser", "DenoiserOutput", "EncoderOutput"]

# Diffusers warns at every cast of a model that `[]` should be kept in float32: nothing should.
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "should be kept in float32: []" not in record.getMessage()
)

"""PVDM's two networks, saved and loaded as diffusers models."""

from pvdm_fast.models.autoencoder import Autoencoder, AutoencoderOutput, EncoderOutput
from pvdm_fast.models.denoiser import Denoiser, DenoiserOutput

__all__ = ["Autoencoder", "AutoencoderOutput", "Denoiser", "DenoiserOutput", "EncoderOutput"]

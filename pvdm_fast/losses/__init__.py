"""Losses of the autoencoder's second phase: a perceptual distance, and discriminators."""

from pvdm_fast.losses.lpips import LPIPS, load_lpips
from pvdm_fast.losses.patchgan import Discriminators, PatchDiscriminator

__all__ = ["LPIPS", "Discriminators", "PatchDiscriminator", "load_lpips"]

"""The presets of a training run: hyper-parameters here, other sizes of the models from `pvdm_fast.models.presets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pvdm_fast.models.presets import AUTOENCODER, DENOISER

# What differs from the defaults in `hyperparameters.py`, and from the sizes of the models.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "mixed_precision": "bf16",
        "optimizer": "muon",
        "save_every": 500,
        "preview_every": 1000,
        "video": {"workers": 0},
        "autoencoder": {
            "depth": 2,
            "latent_channels": 8,
            "steps": 5000,
            "batch_size": 4,
            "loss": "l2",
            "latent_noise": 0.3,
            "learning_rate": 5e-3,
            "beta2": 0.98,
            "schedule": "cosine",
            "warmup": 50,
        },
        "diffusion": {
            "steps": 6000,
            "batch_size": 16,
            "prediction": "flow",
            "normalize_latents": True,
            "time_shift": 4.0,
            "cached_clips": 6144,
            "learning_rate": 6e-3,
            "beta2": 0.98,
            "schedule": "cosine",
            "warmup": 50,
            "conditional_probability": 0.4,
            "sampling_steps": 20,
            "sampling_scheduler": "stochastic",
        },
    },
    # The two below have never been trained to the end. What `tiny`'s trials showed is in them (docs/training.md says
    # how their time shifts follow from its own).
    "small": {
        "optimizer": "muon",
        "autoencoder": {
            "steps": 40_000,
            "latent_noise": 0.1,
            "learning_rate": 3e-4,
            "schedule": "cosine",
            "warmup": 500,
        },
        "diffusion": {
            "steps": 60_000,
            "batch_size": 16,
            "prediction": "flow",
            "normalize_latents": True,
            "time_shift": 6.0,
            "learning_rate": 3e-4,
            "schedule": "cosine",
            "warmup": 500,
        },
    },
    "base": {
        "video": {"workers": 8},
        "autoencoder": {"steps": 200_000, "beta1": 0.5, "beta2": 0.9, "warmup": 1000},
        "diffusion": {
            "steps": 850_000,
            "batch_size": 64,
            "prediction": "flow",
            "normalize_latents": True,
            "time_shift": 8.0,
            "warmup": 1000,
        },
    },
    # Each value with its source: docs/reproducing_the_paper.md. A test compares a step of either stage.
    "release": {
        "mixed_precision": "fp16",
        "video": {"workers": 8, "crop": "centre", "resize": "bilinear", "pad_short": True},
        "autoencoder": {
            "steps": 333_333,
            "accumulate": 3,
            "beta1": 0.5,
            "beta2": 0.9,
            "warmup": 0,
            "clip_norm": 0.0,
        },
        "adversarial": {"adaptive": False, "alternate": True},
        "diffusion": {
            "steps": 850_000,
            "batch_size": 64,
            "warmup": 0,
            "clip_norm": 0.0,
            "conditional_probability": 0.3,
            "class_conditional": False,
            "condition_per": "batch",
            "float32": True,
            "ema_every": 25,
        },
    },
}
SIZES_OF = {"release": "base"}  # presets whose models have another one's sizes

AUTOENCODER_SIZES = tuple(
    f"autoencoder.{name}"
    for name in (
        "patch_size",
        "channels",
        "depth",
        "num_heads",
        "head_dim",
        "latent_channels",
        "projection_depth",
        "projection_hidden",
    )
)
DENOISER_SIZES = tuple(
    f"diffusion.{name}"
    for name in (
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "attention_resolutions",
        "num_heads",
        "positions",
        "prediction",
    )
)
# What goes with the prediction "flow" only.
FLOW_OPTIONS = tuple(f"diffusion.{name}" for name in ("time_mean", "time_std", "time_shift", "normalize_latents"))
# How a model is sampled where nothing else is asked for.
SAMPLING_OPTIONS = tuple(f"diffusion.sampling_{name}" for name in ("steps", "scheduler", "guidance"))
VIDEO_SIZES = ("video.frames", "video.height", "video.width")
SIZES = frozenset((*VIDEO_SIZES, *AUTOENCODER_SIZES, *DENOISER_SIZES))


def _named(keys: tuple[str, ...], sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sizes[key.partition(".")[2]] for key in keys}


def autoencoder_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The options that name an Autoencoder's sizes, from its arguments."""
    return _named((*VIDEO_SIZES, *AUTOENCODER_SIZES), sizes)


def denoiser_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The options that name a Denoiser's sizes, from its arguments; its layout follows from the autoencoder's."""
    return _named(DENOISER_SIZES, sizes)


def preset_sizes(name: str) -> dict[str, Any]:
    """The options that name the sizes of both models of a preset."""
    name = SIZES_OF.get(name, name)
    return autoencoder_sizes(AUTOENCODER[name]) | denoiser_sizes(DENOISER[name])

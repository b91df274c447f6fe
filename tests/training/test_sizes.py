"""Random sizes of both networks are refused before training, or they compute, forward and backward."""

from __future__ import annotations

import random
from typing import Any

import torch

from pvdm_fast.errors import UserError
from pvdm_fast.training.building import empty_autoencoder, empty_denoiser, make_autoencoder, make_denoiser
from pvdm_fast.training.config import make_config

CHOICES: dict[str, list[Any]] = {
    "video.frames": [1, 2, 4, 6],
    "video.height": [8, 16, 24],
    "video.width": [8, 16],
    "autoencoder.patch_size": [1, 2, 4],
    "autoencoder.channels": [8, 16, 20],
    "autoencoder.depth": [1],
    "autoencoder.num_heads": [1, 2, 3],
    "autoencoder.head_dim": [4, 6, 8],
    "autoencoder.latent_channels": [1, 4, 5],
    "autoencoder.projection_depth": [1],
    "autoencoder.projection_hidden": [1, 8, 33],
    "diffusion.model_channels": [32, 64, 96, 50],
    "diffusion.channel_mult": [(1,), (1, 2), (2, 1), (1, 3), (2,)],
    "diffusion.num_res_blocks": [1],
    "diffusion.attention_resolutions": [(), (1,), (2,), (3,)],
    "diffusion.num_heads": [1, 2, 4, 5, 64],
}


def test_random_sizes() -> None:
    draw = random.Random(0)
    computed = refused = 0
    for _ in range(60):
        config = make_config({key: draw.choice(values) for key, values in CHOICES.items()})
        try:
            empty_denoiser(config, empty_autoencoder(config))
        except UserError:
            refused += 1
            continue
        autoencoder = make_autoencoder(config)
        denoiser = make_denoiser(config, autoencoder)
        size = config.video
        video = torch.rand(1, 3, size.frames, size.height, size.width) * 2 - 1  # type: ignore[arg-type]
        latent = autoencoder.encode(video).latent
        autoencoder.decode(latent).sample.sum().backward()
        denoiser(latent.detach(), 5, latent.detach()).sample.sum().backward()
        computed += 1
    assert computed >= 5 and refused >= 20, (computed, refused)

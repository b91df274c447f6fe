"""A run folder with untrained models, and a made-up feature network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluation.networks import save_network

from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.training.config import make_config, to_yaml


def make_run(path: Path) -> Path:
    torch.manual_seed(3)
    autoencoder = Autoencoder.from_preset(
        "tiny", frames=4, height=16, width=24, patch_size=8, channels=16, num_heads=1, head_dim=8,
        latent_channels=4,
    )  # fmt: skip
    layout = autoencoder.layout
    denoiser = Denoiser.from_preset(
        "tiny",
        time=layout.time,
        height=layout.height,
        width=layout.width,
        latent_channels=autoencoder.config["latent_channels"],
        model_channels=32,
        num_heads=2,
        prediction="v",
    )
    autoencoder.save_pretrained(path / "autoencoder")
    denoiser.save_pretrained(path / "denoiser")
    (path / "config.yaml").write_text(to_yaml(make_config({"video.fps": 10.0})))
    records = [{"stage": "autoencoder", "step": step, "loss": 2.0 / step, "seconds": 0.1} for step in range(1, 900)]
    records += [{"stage": "autoencoder", "step": 900, "psnr": 20.5}]
    records += [{"stage": "diffusion", "step": step, "loss": None if step == 3 else 0.5} for step in range(1, 20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 frames of 16 x 24, as training leaves them. Don't write into it."""
    return make_run(tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name a made-up feature network."""
    path = tmp_path_factory.mktemp("network") / "made_up.pt"
    return ["--features", str(path), "--features-sha256", save_network(path)]

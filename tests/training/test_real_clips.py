"""The main job on real video."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from training.small import steps

from pvdm_fast.data import open_dataset
from pvdm_fast.sample import main as sample
from pvdm_fast.train import main as train


def test_clips_are_read(clips: Path) -> None:
    dataset = open_dataset(str(clips), frames=32, height=64, width=64)
    item = dataset[0]
    assert item["video"].shape == (3, 32, 64, 64)
    assert item["video"].std() > 0.1
    assert item["skipped"] == []


@pytest.mark.slow
def test_trains_and_samples(clips: Path, tmp_path: Path) -> None:
    """Both stages at 64 x 64, 16 frames, then 32 sampled frames: a few steps of the README's job."""
    run = tmp_path / "run"
    options = """--preset tiny --frames 16 --height 64 --width 64 --autoencoder-patch-size 8 --autoencoder-channels 32
        --autoencoder-depth 1 --diffusion-model-channels 32 --diffusion-channel-mult 1 2 --autoencoder-batch-size 2
        --diffusion-batch-size 2 --held-out-clips 2 --diffusion-sampling-steps 2 --workers 0 --device cpu
        --diffusion-cached-clips 4"""
    assert train(["--data", str(clips), "--run", str(run), *options.split(), *steps(3)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["autoencoder"]["steps"] == results["diffusion"]["steps"] == 3
    assert 3 < results["autoencoder"]["psnr"] < 60
    assert results["autoencoder"]["unreadable_files"] == {}
    out = tmp_path / "samples.npy"
    assert sample([str(run), "--clips", "2", "--frames", "32", "--steps", "2", "--out", str(out)]) == 0
    assert np.load(out).shape == (2, 32, 64, 64, 3)

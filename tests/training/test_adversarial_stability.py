"""The adversarial phase on real clips: nothing diverges, the reconstruction stays good, no side wins."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from PIL import Image

from pvdm_fast.data import open_dataset
from pvdm_fast.train import main

COMMON = shlex.split("""
    --preset tiny --stage autoencoder --frames 16 --autoencoder-patch-size 8 --autoencoder-depth 1
    --autoencoder-loss l1 --autoencoder-latent-noise 0 --autoencoder-schedule constant --autoencoder-batch-size 2
    --autoencoder-learning-rate 2e-3 --held-out-clips 4 --workers 0 --device cpu
""")


@pytest.fixture(scope="session")
def films(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """50 frames of each clip at 64 x 64, as pictures: decoding videos would take longer than training."""
    folder, number = tmp_path_factory.mktemp("films"), 0
    for split in ("train", "test"):
        dataset = open_dataset(str(clips), frames=50, height=64, width=64, split=split)
        for draw in range(len(dataset)):
            film = folder / f"film{number}"
            film.mkdir()
            number += 1
            frames = dataset[draw]["video"].add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy()
            for time, frame in enumerate(frames):
                Image.fromarray(frame).save(film / f"{time:03d}.png")
    return str(folder)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check(run: Path, start: int, margin: float, span: int) -> None:
    """Compares the last ``span`` steps with those before ``start``, and the held-out PSNR with that at ``start``."""
    steps = [record for record in records(run) if "loss" in record]
    before, after = steps[start - span : start], steps[start:]
    for record in after:
        values = [value for name, value in record.items() if name not in ("stage", "step")]
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in values), record
        assert abs(record["g_loss"]) < 10
        assert record["d_loss"] < 4, "2 is a discriminator that says nothing"
    last = after[-span:]
    assert mean(r["reconstruction"] for r in last) < 1.2 * mean(r.get("reconstruction", r["loss"]) for r in before)
    assert mean(r["d_loss"] for r in last) > 0.2, "0 is a discriminator that tells all apart with certainty"
    psnr = {record["step"]: record["psnr"] for record in records(run) if "psnr" in record}
    print(f"PSNR {psnr}")
    assert psnr[max(psnr)] > psnr[start] - margin


@pytest.mark.parametrize("norm", ["batch", "spectral"])
@pytest.mark.slow
def test_a_few_steps(norm: str, films: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = shlex.split("""--height 32 --width 32 --autoencoder-channels 32 --autoencoder-steps 40
        --autoencoder-warmup 5
        --adversarial-start 20 --adversarial-channels 4 --preview-every 20""")
    assert main(["--data", films, "--run", str(run), *COMMON, *options, "--adversarial-norm", norm]) == 0
    check(run, start=20, margin=1.0, span=10)


@pytest.fixture(scope="module")
def without(films: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1500 steps without discriminators, with the state after 1200 kept."""
    run = tmp_path_factory.mktemp("without") / "run"
    options = shlex.split("""--height 64 --width 64 --autoencoder-channels 64 --autoencoder-steps 1500 --save-every 1200
        --preview-every 1200 --adversarial-channels 16""")
    assert main(["--data", films, "--run", str(run), *COMMON, *options]) == 0
    return run


@pytest.mark.exhaustive
@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_300_steps_after_1200(norm: str, without: Path, tmp_path: Path) -> None:
    """Repeats the last 300 steps of a run from its state after 1200, with discriminators."""
    run = tmp_path / "run"
    shutil.copytree(without, run)
    shutil.rmtree(run / "checkpoints" / "autoencoder-step-0001500")
    (run / "results.json").unlink()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("norm: batch", f"norm: {norm}"))
    assert main(["--resume", str(run), "--adversarial-start", "1200"]) == 0
    check(run, start=1200, margin=1.0, span=50)

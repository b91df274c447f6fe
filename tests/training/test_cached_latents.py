"""The diffusion stage on cached latents trains as on the videos, and only with the same autoencoder."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from training.small import SMALL, losses, same_weights, steps

from pvdm_fast import encode
from pvdm_fast.backends import precision
from pvdm_fast.data.clips import ClipSpec
from pvdm_fast.data.latents import LatentClips
from pvdm_fast.models import Autoencoder
from pvdm_fast.train import main

STEPS = 6


SPEC = ClipSpec(frames=8, height=16, width=16)


def cached(run: Path, out: Path, *more: str) -> Path:
    """The clips of all steps, at every window."""
    options = ["--clips", str(2 * STEPS), "--windows", "5", "--workers", "0", "--shard-clips", "5", "--device", "cpu"]
    options += more
    assert encode.main(["synthetic:shapes", str(out), "--autoencoder", str(run), "--test-clips", "3", *options]) == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has its autoencoder."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main([*SMALL, "--autoencoder-steps", "1", "--stage", "autoencoder", "--run", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def latents(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached(trained, tmp_path_factory.mktemp("latents") / "out")


def diffusion(run: Path, autoencoder: Path, data: str | Path) -> int:
    where = ["--run", str(run), "--autoencoder-from", str(autoencoder), "--data", str(data)]
    return main([*SMALL, *steps(STEPS), "--stage", "diffusion", *where])


@pytest.mark.slow
def test_training_equals_training_on_the_videos(trained: Path, latents: Path, tmp_path: Path) -> None:
    """Losses, gradient norms and held-out loss are equal, except for rounding with other batch sizes."""
    assert diffusion(tmp_path / "a", trained, "synthetic:shapes") == 0
    assert diffusion(tmp_path / "b", trained, latents) == 0
    on_videos, on_latents = (losses(tmp_path / name, "diffusion") for name in "ab")
    assert len(on_videos) == STEPS
    for first, second in zip(on_videos, on_latents, strict=True):
        assert second == pytest.approx(first, rel=1e-3)
    results = [json.loads((tmp_path / name / "results.json").read_text())["diffusion"] for name in "ab"]
    assert results[0]["held_out_loss"] == pytest.approx(results[1]["held_out_loss"], rel=1e-3)
    for name in ("samples.mp4", "grid.png"):
        assert (tmp_path / "b" / name).stat().st_size > 0
    assert main(["--resume", str(tmp_path / "b"), "--stage", "diffusion", "--data", str(latents)]) == 0


def test_another_autoencoder_is_refused(
    trained: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight differs in its last digits."""
    other = Autoencoder.from_pretrained(trained / "autoencoder")
    with torch.no_grad():
        other.xy_token[0, 0, 0] *= 1.0001
    other.save_pretrained(tmp_path / "other")
    assert diffusion(tmp_path / "b", tmp_path / "other", latents) == 2
    assert "made by another autoencoder" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_latents_in_bf16_are_others(
    trained: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Near those in float32, marked as such, and never mixed with them in a folder."""
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: True)
    exact, low = LatentClips(latents, SPEC), LatentClips(cached(trained, tmp_path / "low", "--dtype", "bf16"), SPEC)
    assert (exact.settings.dtype, low.settings.dtype) == ("float32", "bf16")
    difference = (exact[0]["video"] - low[0]["video"]).abs().max()
    assert 0 < difference < 0.1
    capsys.readouterr()
    with pytest.raises(AssertionError):
        cached(trained, latents, "--dtype", "bf16")
    assert "holds latents made with dtype float32, but bf16 is asked for" in capsys.readouterr().err


def test_folders_of_before_there_was_a_choice_are_used(latents: Path, trained: Path, tmp_path: Path) -> None:
    """Their settings name no dtype, crop, resizing or fold, and their shards carry the hash of the settings without."""
    old = tmp_path / "old"
    shutil.copytree(latents, old)
    for name in ("settings.json", "index.json"):
        found = json.loads((old / name).read_text())
        for later in ("dtype", "crop", "resize", "fold"):
            del (found["settings"] if name == "index.json" else found)[later]
        (old / name).write_text(json.dumps(found))
    values = json.loads((old / "settings.json").read_text())
    expected = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    assert LatentClips(old, SPEC).settings.hash() == expected
    assert torch.equal(LatentClips(old, SPEC)[0]["video"], LatentClips(latents, SPEC)[0]["video"])
    cached(trained, old)


def test_the_autoencoder_cannot_be_trained_on_latents(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *steps(2), "--run", str(tmp_path / "a"), "--data", str(latents)]) == 2
    assert "serve --stage diffusion only" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_can_encode_its_clips_once(trained: Path, tmp_path: Path) -> None:
    """--diffusion-cached-clips trains as on a folder of latents of the same clips. Stopped, it goes on exactly. In the
    end the latents are removed."""
    encoded = tmp_path / "encoded"
    options = ["--clips", "8", "--test-clips", "2", "--workers", "0", "--device", "cpu"]
    assert encode.main(["synthetic:shapes", str(encoded), "--autoencoder", str(trained), *options]) == 0
    alike = [*SMALL, "--diffusion-schedule", "constant", "--stage", "diffusion", "--autoencoder-from", str(trained)]
    assert main([*alike, *steps(STEPS), "--data", str(encoded), "--run", str(tmp_path / "a")]) == 0
    once = [*alike, "--diffusion-cached-clips", "8"]
    assert main([*once, *steps(STEPS), "--run", str(tmp_path / "b")]) == 0
    assert losses(tmp_path / "a", "diffusion") == losses(tmp_path / "b", "diffusion")
    assert same_weights(tmp_path / "a", tmp_path / "b", "denoiser")
    assert not (tmp_path / "b" / "latents").exists()
    assert main([*once, *steps(STEPS - 2), "--run", str(tmp_path / "c")]) == 0
    assert main(["--resume", str(tmp_path / "c"), "--stage", "diffusion", "--diffusion-steps", str(STEPS)]) == 0
    assert same_weights(tmp_path / "b", tmp_path / "c", "denoiser")


def test_clips_that_are_latents_already_are_not_encoded_again(trained: Path, latents: Path, tmp_path: Path) -> None:
    where = ["--run", str(tmp_path / "a"), "--autoencoder-from", str(trained), "--data", str(latents)]
    assert main([*SMALL, "--diffusion-cached-clips", "8", *steps(1), "--stage", "diffusion", *where]) == 0
    assert not (tmp_path / "a" / "latents").exists()

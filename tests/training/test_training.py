"""Whole runs: what they produce, exact resuming, stopping, and what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from training.small import SMALL, checkpoint_names, losses, same_weights, start, steps, wait_for, weights

from pvdm_fast.data import write_video
from pvdm_fast.data.shapes import draw_scene
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.train import main
from pvdm_fast.training import checkpoint, trainer
from pvdm_fast.training.stages import AutoencoderStage, DiffusionStage

STAGES = {"autoencoder": AutoencoderStage, "diffusion": DiffusionStage}


def train(run: Path, *arguments: str) -> int:
    return main([*SMALL, *arguments, "--run", str(run)])


def test_a_run_leaves_everything(finished: Path) -> None:
    for name in ("config.yaml", "reconstructions.mp4", "samples.mp4", "grid.png", "metrics.jsonl", "loss.png"):
        assert (finished / name).stat().st_size > (5000 if name.endswith(".png") else 0), name
    previews = sorted(item.name for item in (finished / "previews").iterdir())
    assert previews == [f"{stage}-step-8.{suffix}" for stage in STAGES for suffix in ("mp4", "png")]
    newest = (finished / "previews" / "diffusion-step-8.mp4").read_bytes()
    assert (finished / "samples.mp4").read_bytes() == newest
    assert not list(finished.rglob(".*")), "temporary files are left"
    autoencoder = Autoencoder.from_pretrained(finished / "autoencoder")
    denoiser = Denoiser.from_pretrained(finished / "denoiser")
    assert autoencoder.layout == denoiser.layout
    results = json.loads((finished / "results.json").read_text())
    assert results["autoencoder"]["psnr"] > 3
    assert results["diffusion"]["held_out_loss"] > 0
    for stage in STAGES:
        assert [step for step, _, _ in losses(finished, stage)] == list(range(1, 9))
    assert checkpoint_names(finished) == ["autoencoder-step-0000008", "diffusion-step-0000008"]


def test_the_saved_denoiser_has_the_averaged_weights(finished: Path) -> None:
    newest, _ = checkpoint.newest_good(finished / "checkpoints")
    assert newest is not None
    state = checkpoint.load(newest)
    saved = weights(finished, "denoiser")
    names = [name for name, _ in Denoiser.from_pretrained(finished / "denoiser").named_parameters()]
    averaged = dict(zip(names, state["stage"]["ema"]["shadow_params"], strict=True))
    assert all(torch.equal(saved[name], averaged[name]) for name in names)
    assert any(not torch.equal(saved[name], state["model"][name]) for name in names)


def stop_after(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal during the given step of a stage."""
    original = STAGES[stage].loss
    seen = []

    def loss(self: object, *arguments: object) -> torch.Tensor:
        seen.append(None)
        if len(seen) == step:
            os.kill(os.getpid(), number)
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(STAGES[stage], "loss", loss)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_an_interrupted_run_continues_exactly(
    stage: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, stage, 4)
        assert train(run, *steps(8)) == 128 + signal.SIGTERM
    assert losses(run, stage)[-1][0] == 4
    assert f"python -m pvdm_fast.train --resume {run}" in capsys.readouterr().out
    torch.manual_seed(1234)  # the continued run must not depend on what this process did in between
    assert main(["--resume", str(run)]) == 0
    assert f"continuing the {stage} stage after step 4" in capsys.readouterr().out
    for name in STAGES:
        assert losses(run, name) == losses(finished, name)
    assert same_weights(run, finished, "autoencoder")
    assert same_weights(run, finished, "denoiser")


@pytest.mark.slow
def test_steps_after_the_last_checkpoint_are_taken_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill without warning: the checkpoint is older than the records."""
    run = tmp_path / "run"

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        original = trainer.Trainer.train_step

        def step(self: trainer.Trainer, batches: list) -> dict:
            return killed() if self.progress.step == 7 else original(self, batches)  # type: ignore[return-value]

        patch.setattr(trainer.Trainer, "train_step", step)
        assert train(run, *steps(8), "--save-every", "3") == 130
    assert checkpoint_names(run) == ["autoencoder-step-0000003", "autoencoder-step-0000006"]
    assert len(losses(run, "autoencoder")) == 7
    assert main(["--resume", str(run)]) == 0
    assert losses(run, "autoencoder") == losses(finished, "autoencoder")
    assert same_weights(run, finished, "denoiser")


# SIGTERM in real processes is in test_processes.py too.
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
@pytest.mark.slow
def test_a_signal_stops_a_real_process_after_saving(number: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start([*SMALL, *steps(100_000), "--workers", "1", "--run", str(run)])
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run, "autoencoder")) > 2, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + number, output
    assert f"continue with: python -m pvdm_fast.train --resume {run}" in output
    assert "Traceback" not in output
    newest, _ = checkpoint.newest_good(run / "checkpoints")
    assert newest is not None
    assert newest.step == losses(run, "autoencoder")[-1][0]


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Makes the autoencoder's loss NaN in its n-th computations."""
    original = AutoencoderStage.loss
    seen = []

    def loss(self: AutoencoderStage, *arguments: object) -> torch.Tensor:
        seen.append(None)
        return original(self, *arguments) * (float("nan") if len(seen) in calls else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(AutoencoderStage, "loss", loss)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {3, 4})
    run = tmp_path / "run"
    assert train(run, *steps(6), "--stage", "autoencoder", "--max-skipped", "2") == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    skipped = [record["step"] for record in records if "skipped" in record]
    assert skipped == [3, 4]
    assert all(torch.isfinite(tensor).all() for tensor in weights(run, "autoencoder").values())
    assert "synthetic:shapes/train/4" in capsys.readouterr().err, "the clips of step 3 are named"


def test_a_loss_that_stays_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, set(range(5, 100)))
    run = tmp_path / "run"
    assert train(run, *steps(50), "--save-every", "2", "--max-skipped", "2") == 3
    error = capsys.readouterr().err
    assert "step 7 of the autoencoder stage had a loss of nan" in error
    assert "synthetic:shapes/train/12, synthetic:shapes/train/13" in error
    assert "Traceback" not in error
    (saved,) = checkpoint.found(run / "failed")
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.load(saved)["model"].values())
    assert checkpoint.newest_good(run / "checkpoints")[0] is not None


@pytest.mark.slow
def test_accumulated_batches_are_one_larger_batch(tmp_path: Path) -> None:
    # without noise on the latent, which is drawn in each forward pass
    options = ["--stage", "autoencoder", "--autoencoder-steps", "2", "--autoencoder-latent-noise", "0"]
    assert train(tmp_path / "whole", *options, "--autoencoder-batch-size", "4") == 0
    assert train(tmp_path / "parts", *options, "--autoencoder-accumulate", "2") == 0
    whole, parts = (np.array(losses(tmp_path / name, "autoencoder")) for name in ("whole", "parts"))
    np.testing.assert_allclose(parts, whole, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.slow
def test_16_bits_train_both_stages(precision: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, *steps(3), "--mixed-precision", precision, "--autoencoder-checkpointing") == 0
    assert all(tensor.dtype == torch.float32 for tensor in weights(run, "denoiser").values())
    assert len(losses(run, "diffusion")) == 3


@pytest.mark.slow
def test_the_stages_can_be_run_one_after_the_other(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, *steps(8), "--stage", "autoencoder") == 0
    assert main(["--resume", str(run), "--stage", "diffusion"]) == 0
    assert same_weights(run, finished, "denoiser")


def test_diffusion_can_take_another_run_s_autoencoder(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, *steps(8), "--stage", "diffusion", "--autoencoder-from", str(finished)) == 0
    assert same_weights(run, finished, "autoencoder")
    assert same_weights(run, finished, "denoiser")


@pytest.mark.slow
def test_real_files_and_a_broken_one_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films, run = tmp_path / "films", tmp_path / "run"
    films.mkdir()
    for number in range(6):
        scene = draw_scene(np.random.default_rng(number), 1.5)
        write_video(films / f"film{number}.mp4", scene.render(24, 32, 48), fps=12)
    (films / "broken.mp4").write_text("not a video")
    assert (
        train(run, *steps(8), "--data", str(films), "--width", "24", "--stride", "2", "--flip", "--workers", "1") == 0
    )
    output = capsys.readouterr().out
    assert "1 file could not be read" in output
    assert f"  {films / 'broken.mp4'}: " in output
    assert Autoencoder.from_pretrained(run / "autoencoder").layout == TriplaneLayout(4, 2, 3)
    assert len(losses(run, "diffusion")) == 8


class FullDisk:
    """Makes fsync fail as on a full disk, when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        original = os.fsync

        def fsync(descriptor: int) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, run = FullDisk(monkeypatch), tmp_path / "run"
    original = trainer.Trainer.train_step

    def step(self: trainer.Trainer, batches: list) -> dict:
        disk.full = self.progress.step >= 4
        return original(self, batches)

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    assert train(run, *steps(8), "--save-every", "3") == 2
    error = capsys.readouterr().err
    assert "No space left on device; the last good one is" in error
    assert "Traceback" not in error
    assert checkpoint_names(run) == ["autoencoder-step-0000003"]
    assert checkpoint.newest_good(run / "checkpoints")[0] is not None

"""Runs whose denoiser learns rectified flow: they resume exactly, and everything that follows takes their models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training.small import SMALL, assert_refused, losses, same_weights

from pvdm_fast import PVDMPipeline, evaluate
from pvdm_fast.models import Denoiser
from pvdm_fast.sample import main as sample_main
from pvdm_fast.train import main

FLOW = ["--diffusion-prediction", "flow", "--diffusion-schedule", "constant", "--autoencoder-steps", "1"]
TIMES = [
    *("--diffusion-normalize-latents", "--diffusion-time-mean", "-0.5", "--diffusion-time-std", "1.2"),
    *("--diffusion-time-shift", "2"),
]


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("flow") / "run"
    assert main([*SMALL, *FLOW, *TIMES, "--diffusion-steps", "6", "--run", str(run)]) == 0
    return run


@pytest.mark.slow
def test_a_resumed_run_of_flow_is_the_same(flow: Path, tmp_path: Path) -> None:
    """Its latents' statistics too, though the clips that they were measured on are gone."""
    run = tmp_path / "run"
    assert main([*SMALL, *FLOW, *TIMES, "--diffusion-steps", "3", "--run", str(run)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pvdm_fast.models.latent_statistics.measure", None)
        assert main(["--resume", str(run), "--diffusion-steps", "6"]) == 0
    assert losses(run, "diffusion") == losses(flow, "diffusion")
    assert same_weights(run, flow, "denoiser")
    configs = [Denoiser.load_config(place / "denoiser") for place in (run, flow)]
    assert configs[0]["latent_std"] == configs[1]["latent_std"]


def test_the_times_change_what_is_learned(flow: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*SMALL, *FLOW, *TIMES[:-1], "1", "--diffusion-steps", "1", "--run", str(run)]) == 0
    assert losses(run, "diffusion")[0] != losses(flow, "diffusion")[0]


def test_the_saved_denoiser_knows_its_prediction(flow: Path) -> None:
    config = Denoiser.from_pretrained(flow / "denoiser").config
    assert (config["prediction"], config["time_shift"]) == ("flow", 2.0)
    assert np.shape(config["latent_mean"]) == np.shape(config["latent_std"]) == (3, 4)
    assert 0 < np.min(config["latent_std"]) < 1, "those of latents in [-1, 1]"
    assert np.isfinite(json.loads((flow / "results.json").read_text())["diffusion"]["held_out_loss"])
    assert (flow / "samples.mp4").stat().st_size > 0


@pytest.mark.parametrize("scheduler", ["auto", "heun"])
def test_it_is_sampled_by_the_command_and_the_pipeline(flow: Path, tmp_path: Path, scheduler: str) -> None:
    out = tmp_path / "out.npy"
    options = ["--steps", "3", "--frames", "7", "--device", "cpu", "--scheduler", scheduler, "--guidance", "1"]
    assert sample_main([str(flow), "--out", str(out), "--clips", "2", *options]) == 0
    assert np.load(out).shape == (2, 7, 16, 16, 3)
    if scheduler == "auto":
        pipeline = PVDMPipeline.from_pretrained(flow)
        assert pipeline.scheduler.config["shift"] == 2 and pipeline.scheduler.config["stochastic_sampling"]
        pipeline.save_pretrained(tmp_path / "pipeline")
        frames = [
            pipe(num_frames=7, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).frames
            for pipe in (pipeline, PVDMPipeline.from_pretrained(tmp_path / "pipeline"))
        ]
        assert np.array_equal(*frames)


def test_a_scheduler_that_does_not_fit_is_refused_before_a_file_is_begun(
    flow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "film" / "out.npy"
    assert sample_main([str(flow), "--out", str(out), "--device", "cpu", "--scheduler", "ddim"]) == 2
    error = capsys.readouterr().err
    assert "the scheduler ddim doesn't go with this denoiser, which predicts flow: choose one of" in error
    assert not out.parent.exists()
    assert evaluate.main([str(flow), "--out", str(out.parent), "--device", "cpu", "--scheduler", "ddpm"]) == 2
    assert "which predicts flow" in capsys.readouterr().err


def test_a_scheduler_that_a_run_cannot_keep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert_refused(
        ["--diffusion-sampling-scheduler", "heun"], "--diffusion-sampling-scheduler heun doesn't go", run, capsys
    )
    assert_refused(["--diffusion-sampling-scheduler", "fast"], "there is no scheduler called 'fast'", run, capsys)


def test_an_evaluation_records_the_sampler_that_auto_chose(flow: Path, tmp_path: Path) -> None:
    options = ["--clips", "2", "--samples", "1", "--steps", "2", "--frames", "4", "--device", "cpu"]
    assert evaluate.main([str(flow), "--out", str(tmp_path), *options]) == 0
    protocol = json.loads((tmp_path / "evaluation.json").read_text())["protocol"]
    assert protocol["sampling"]["scheduler"] == "stochastic", "the preset tiny asks for it"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--diffusion-time-shift", "3"],
            "--diffusion-time-shift goes with --diffusion-prediction flow, not v: leave it out, or train a flow",
        ),
        (["--diffusion-prediction", "noise", "--diffusion-time-mean", "1"], "--diffusion-time-mean goes with"),
        (["--diffusion-prediction", "flow", "--diffusion-time-shift", "0"], "must be at least 0.01, not 0"),
        (["--diffusion-prediction", "velocity"], "must be one of noise, v, flow"),
        (["--diffusion-normalize-latents"], "--diffusion-normalize-latents goes with --diffusion-prediction flow"),
        (["--diffusion-prediction", "flow", "--diffusion-loss-weight", "min_snr"], "but flow has none: leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*SMALL, *options, "--run", str(run)]) == 2
    assert sentence in capsys.readouterr().err
    assert not run.exists()


def test_a_trained_flow_is_a_start_with_its_statistics(flow: Path, tmp_path: Path) -> None:
    run, options = tmp_path / "run", ["--init-from", str(flow), "--stage", "diffusion", "--diffusion-steps", "1"]
    assert main([*SMALL, "--diffusion-prediction", "flow", *options, "--run", str(run)]) == 0
    configs = [Denoiser.load_config(place / "denoiser") for place in (run, flow)]
    assert configs[0]["latent_std"] == configs[1]["latent_std"]
    assert configs[0]["time_shift"] == 4  # the preset's


def test_a_denoiser_of_noise_is_no_start_for_flow(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--init-from", str(finished), "--diffusion-prediction", "flow", "--run", str(tmp_path / "run")]
    assert main([*SMALL, *options]) == 2
    assert "--diffusion-prediction is flow, but the models in" in capsys.readouterr().err

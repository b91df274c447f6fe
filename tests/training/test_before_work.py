"""What cannot work is found before the run folder exists, not hours later: one sentence, exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training.small import assert_refused

from pvdm_fast.backends import choice
from pvdm_fast.data import write_video
from pvdm_fast.data.shapes import draw_scene
from pvdm_fast.errors import UserError
from pvdm_fast.models import Denoiser
from pvdm_fast.training.adversarial import check_second_phase
from pvdm_fast.training.building import empty_autoencoder, empty_denoiser
from pvdm_fast.training.config import make_config
from pvdm_fast.training.report import _backends, check_later_denoiser


@pytest.mark.parametrize(
    ("arguments", "module", "message"),
    [
        (["--tensorboard"], "torch.utils.tensorboard", "pip install 'pvdm-fast[tensorboard]'"),
        (["--wandb"], "wandb", "pip install 'pvdm-fast[wandb]'"),
        (["--optimizer", "adamw8bit"], "bitsandbytes.optim", "pip install 'pvdm-fast[8bit]'"),
    ],
)
def test_packages_that_are_not_there(
    arguments: list[str],
    module: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what makes importing it an ImportError
    assert_refused(arguments, message, tmp_path / "run", capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--diffusion-num-heads", "3"], "num_heads 3 divide the channels of every level"),
        (
            ["--diffusion-attention-resolutions", "2"],
            "--diffusion-attention-resolutions 2 must be among the levels' downsampling factors, which are 1:",
        ),
    ],
)
def test_the_denoiser_s_options_are_checked_before_the_autoencoder_trains(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["--stage", "autoencoder", *arguments], message, tmp_path / "run", capsys)


def test_cached_clips_are_not_padded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pad-short", "--diffusion-cached-clips", "8"]
    assert_refused(arguments, "take --diffusion-cached-clips 0, or leave it out", tmp_path / "run", capsys)


def test_a_preset_s_denoiser_that_will_not_fit_is_said() -> None:
    """Nobody asked for these sizes, and a later run may choose others."""
    config = make_config({"preset": "small", "stage": "autoencoder", "video.frames": 2})
    ((label, text),) = check_later_denoiser(config, empty_autoencoder(config))
    assert label == "denoiser" and text.startswith("not trained here; for these latents it needs other sizes")
    config = make_config({"preset": "small", "stage": "autoencoder"})
    assert check_later_denoiser(config, empty_autoencoder(config)) == []


@pytest.mark.parametrize("resolutions", [[3], [1, 6], [0], [-2]])
def test_attention_at_no_level_is_refused(resolutions: list[int]) -> None:
    sizes = dict(time=2, height=2, width=2, model_channels=32, channel_mult=[1, 2], num_res_blocks=1, num_heads=1)
    with torch.device("meta"):
        Denoiser(**sizes)  # the default names levels of larger networks too
        with pytest.raises(ValueError, match=r"must be downsampling factors of levels: 1, 2, 4"):
            Denoiser(**sizes, attention_resolutions=resolutions)


def test_attention_at_the_levels_of_the_preset() -> None:
    for mult, asked, fits in ((None, (1, 4), True), (None, (8,), False), ((1, 2), (4,), False), ((1, 2), (2,), True)):
        changes = {"diffusion.channel_mult": mult, "diffusion.attention_resolutions": asked}
        config = make_config({"preset": "small", **{key: value for key, value in changes.items() if value is not None}})
        if fits:
            empty_denoiser(config, empty_autoencoder(config))
        else:
            with pytest.raises(UserError, match="must be among the levels'"):
                empty_denoiser(config, empty_autoencoder(config))


def test_held_out_clips_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are read first when the stage is scored."""
    for split, frames in (("train", 12), ("test", 1)):
        for number in range(2):
            scene = draw_scene(np.random.default_rng(number), 1.5)
            (tmp_path / "films" / split).mkdir(parents=True, exist_ok=True)
            write_video(tmp_path / "films" / split / f"{number}.mp4", scene.render(frames, 16, 16))
    assert_refused(["--data", str(tmp_path / "films")], "no usable video", tmp_path / "run", capsys)


def test_a_backend_of_the_environment_that_cannot_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "_requested", "cuda")  # as PVDM_FAST_BACKEND does
    assert_refused([], "Backend 'cuda' was asked for, but cannot serve", tmp_path / "run", capsys)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_backend_of_the_environment_that_can(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := choice.unavailable(backend):
        pytest.skip(reason)
    monkeypatch.setattr(choice, "_requested", backend)
    assert _backends(torch.device("cpu")) == f"{backend}, as asked for"


def test_batch_statistics_of_several_processes_on_a_cpu() -> None:
    config = make_config({"adversarial.start": 1})
    for processes, device, refused in ((2, "cpu", True), (1, "cpu", False), (2, "cuda", False)):
        accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
        if refused:
            with pytest.raises(UserError, match="choose --adversarial-norm spectral"):
                check_second_phase(config, 32, 32, accelerator)  # type: ignore[arg-type]
        else:
            assert check_second_phase(config, 32, 32, accelerator)  # type: ignore[arg-type]

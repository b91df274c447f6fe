"""``python -m pvdm_fast.sample`` of many clips: batches, a folder that is gone on with, and refused options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from pvdm_fast.diffusion import sampling
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.sample import main

Sample = Callable[..., int]


def save_models(folder: Path, autoencoder: Any, denoiser: Any) -> Path:
    """A folder as training leaves it, with numbers in the layers that start as zeros."""
    for name, model in (("autoencoder", autoencoder), ("denoiser", denoiser)):
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        model.eval().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_models(
        tmp_path_factory.mktemp("run"),
        Autoencoder(frames=4, height=16, width=16, patch_size=8, channels=16, depth=1, num_heads=1, head_dim=8),
        Denoiser(time=4, height=2, width=2, model_channels=32, channel_mult=[1], num_heads=2, num_res_blocks=1),
    )


@pytest.fixture
def sample(run: Path) -> Sample:
    """The command: five clips in batches of two, unless other options are given."""

    def command(out: str | Path, *arguments: str) -> int:
        few = ["--steps", "2", "--clips", "5", "--batch-size", "2", "--seed", "3", "--device", "cpu", "--threads", "1"]
        return main([str(run), "--out", str(out), *few, *arguments])

    return command


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("seed-"))


def closely(one: np.ndarray, other: np.ndarray) -> bool:
    """Up to rounding: other batches may round a pixel to the next level."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


def test_one_file_is_the_same_in_batches(sample: Sample, tmp_path: Path) -> None:
    """An array, longer than a clip, and cut; and a grid with each video in its place."""
    frames = ["--frames", "6"]
    assert sample(tmp_path / "all.npy", *frames, "--batch-size", "8") == 0
    assert sample(tmp_path / "parts.npy", *frames) == 0
    videos = np.load(tmp_path / "parts.npy")
    assert videos.shape == (5, 6, 16, 16, 3)
    assert closely(videos, np.load(tmp_path / "all.npy"))
    assert sample(tmp_path / "grid.mp4", *frames, "--crf", "1") == 0
    with av.open(str(tmp_path / "grid.mp4")) as container:
        grid = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert grid.shape == (6, 52, 34, 3)
    for number, video in enumerate(videos):
        top, left = 18 * (number // 2), 18 * (number % 2)
        cell = grid[:, top : top + 16, left : left + 16]
        assert np.abs(cell.mean((1, 2)) - video.mean((1, 2))).max() < 6, number


def test_a_folder_has_a_file_for_each_clip(sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every format; and a name says how to make that clip alone."""
    assert sample(tmp_path / "all.npy") == 0
    videos = np.load(tmp_path / "all.npy")
    for form in ("npy", "png", "mp4", "gif"):
        assert sample(f"{tmp_path}/{form}/", "--format", form) == 0
        suffix = "" if form == "png" else f".{form}"
        assert names(tmp_path / form) == [f"seed-3-clip-{number:06}{suffix}" for number in range(5)]
    for number, video in enumerate(videos):
        name = f"seed-3-clip-{number:06}"
        assert np.array_equal(np.load(tmp_path / f"npy/{name}.npy"), video)
        pictures = sorted((tmp_path / "png" / name).iterdir())
        assert [path.name for path in pictures] == [f"{frame:06}.png" for frame in range(4)]
        assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pictures]), video)
        with av.open(str(tmp_path / f"mp4/{name}.mp4")) as container:
            assert len(list(container.decode(video=0))) == 4
    assert "5 videos of 4 frames, 16x16, written to" in capsys.readouterr().out
    assert sample(tmp_path / "one.npy", "--clips", "1", "--clips-from", "4") == 0
    assert closely(np.load(tmp_path / "one.npy"), videos[4:])


def test_a_folder_is_gone_on_with(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the second batch: what is complete stays, the rest is made, and every byte is as without it."""
    calls: list[int] = []
    original = sampling.sample_latents

    def counted(denoiser: Any, scheduler: Any, shape: Any, **options: Any) -> torch.Tensor:
        calls.append(shape[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(denoiser, scheduler, shape, **options)

    assert sample(f"{tmp_path}/whole/") == 0
    monkeypatch.setattr(sampling, "sample_latents", counted)
    out = tmp_path / "parts"
    assert sample(f"{out}/") == 130
    assert "2 of 5 videos are written; the same command goes on from here" in capsys.readouterr().err
    assert names(out) == ["seed-3-clip-000000.mp4", "seed-3-clip-000001.mp4"]
    (out / "seed-3-clip-000001.mp4").unlink()
    (out / ".seed-3-clip-000001.mp4.7.tmp").write_text("a killed job's")
    before = (out / "seed-3-clip-000000.mp4").stat()
    assert sample(out) == 0, "an existing folder needs no / at its end"
    assert calls == [2, 2, 2, 2, 1], "the first batch as it was, for the sake of its last bits"
    assert "(1 of them were there already)" in capsys.readouterr().out
    assert (out / "seed-3-clip-000000.mp4").stat().st_mtime_ns == before.st_mtime_ns
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    for name in names(tmp_path / "whole"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sample(out) == 0 and len(calls) == 5, "nothing is left to do"
    assert sample(out, "--overwrite") == 0 and len(calls) == 8
    assert sample(out, "--seed", "4", "--clips", "1") == 0
    assert len(names(out)) == 6, "another seed beside it"


def test_a_folder_holds_clips_of_one_kind(sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert sample(f"{out}/", "--clips", "1") == 0
    assert json.loads((out / "sampling.json").read_text())["steps"] == 2
    for arguments, change in (
        (["--steps", "3", "--eta", "0"], "steps: 2, now 3, eta: 1.0, now 0.0"),
        (["--format", "png"], "format: mp4, now png"),
        (["--crf", "30", "--overwrite"], "crf: 18, now 30"),
    ):
        assert sample(out, *arguments) == 2
        assert f"the clips in {out} were made otherwise ({change}" in capsys.readouterr().err
    assert sample(out, "--crf", "18") == 0, "the default, written out"
    (out / "sampling.json").write_text("{")
    assert sample(out) == 2
    assert "sampling.json" in capsys.readouterr().err
    (out / "sampling.json").unlink()
    assert sample(out) == 2
    assert "holds clips but no sampling.json that says how they were made" in capsys.readouterr().err


def test_other_weights_are_another_kind(run: Path, sample: Sample, tmp_path: Path) -> None:
    assert sample(f"{tmp_path}/out/", "--clips", "1") == 0
    denoiser = Denoiser.from_pretrained(run / "denoiser")
    with torch.no_grad():
        next(denoiser.parameters()).mul_(1.01)
    other = save_models(tmp_path / "other", Autoencoder.from_pretrained(run / "autoencoder"), denoiser)
    assert main([str(other), "--out", f"{tmp_path}/out/", "--steps", "2", "--clips", "1", "--device", "cpu"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", "2"], "--stride chooses frames of --condition: give a video with it, or leave it out"),
        (["--eta", "1", "--scheduler", "dpm++"], "--eta is DDIM's share of new noise, and dpm++ has none"),
        (["--format", "png"], "--format is for a folder (--out DIR/), and "),
        (["--out", "folder/", "--format", "avi"], "--format must be one of mp4, gif, npy, png, not 'avi'"),
        (["--fps", "8"], "--fps is for mp4 and gif, and npy holds no frame rate"),
        (["--out", "folder/", "--format", "png", "--fps", "8"], "and png holds no frame rate"),
        (["--out", "a.gif", "--crf", "8"], "--crf is the quality of mp4, and gif has none"),
        (["--out", "a.mp4", "--crf", "52"], "--crf must be at most 51, not 52"),
        (
            ["--guidance", "1"],
            "--guidance has nothing to follow: give a --class, a --condition, or more --frames than 4",
        ),
        (["--clips-from", "-1"], "--clips-from must be at least 0, not -1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--out", "a.mp4", "--clips", "60000"], "60000 videos side by side are 4408x4408 pixels, more than players"),
        (["--out", "folder"], "must end in .mp4, .gif, .npy, or in / for a folder with a file for each clip"),
    ],
)
def test_what_has_no_effect_is_refused(
    sample: Sample,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample("out.npy", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "before any work"


def test_frame_rate_and_quality(run: Path, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's frame rate unless another is given, and smaller files of less quality."""

    def rate(name: str) -> float:
        with av.open(str(tmp_path / name)) as container:
            return float(container.streams.video[0].average_rate or 0)

    (run / "config.yaml").write_text("video: {fps: 12.0}\n")
    try:
        assert sample(tmp_path / "a.mp4") == 0
        assert sample(tmp_path / "b.mp4", "--fps", "5", "--crf", "40") == 0
    finally:
        (run / "config.yaml").unlink()
    assert sample(tmp_path / "c.mp4") == 0
    assert [rate(f"{name}.mp4") for name in "abc"] == [12, 5, 8]
    assert (tmp_path / "b.mp4").stat().st_size < (tmp_path / "a.mp4").stat().st_size


def test_a_single_picture_is_no_condition(sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "one.png", tmp_path / "folder/one.png"):
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(place)
    for condition in (tmp_path / "one.png", tmp_path / "folder"):
        assert sample(tmp_path / "out.npy", "--condition", str(condition)) == 2
        assert "a single picture, and this model has only learned to go on from a whole clip" in capsys.readouterr().err


RSS = """
import re, sys
from pathlib import Path
Path("/proc/self/clear_refs").write_text("5")  # else the peak begins with that of the process that forked this one
from pvdm_fast.sample import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_clips(tmp_path: Path) -> None:
    """200 clips of the tiny sizes take 16 MB more than 50 at most; all in one batch they would take over 100."""
    run = save_models(tmp_path / "run", Autoencoder.from_preset("tiny"), Denoiser.from_preset("tiny"))

    def peak(out: str, clips: int, batch: int) -> float:
        arguments = [str(run), "--out", f"{tmp_path}/{out}", "--clips", str(clips), "--batch-size", str(batch)]
        result = subprocess.run(
            [sys.executable, "-c", RSS, *arguments, "--steps", "1", "--device", "cpu"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return int(result.stdout.split()[-1]) / 1024

    few, many, at_once = peak("few/", 50, 8), peak("many/", 200, 8), peak("at_once/", 200, 200)
    assert many < few + 16, (few, many)
    assert at_once > few + 100, (few, at_once)

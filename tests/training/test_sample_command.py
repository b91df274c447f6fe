"""``python -m pvdm_fast.sample``: files written during sampling, continued videos, classes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from filling import randomised
from training.small import SMALL, steps

from pvdm_fast import sample
from pvdm_fast.data import open_video, write_video
from pvdm_fast.data.shapes import KINDS, draw_scene
from pvdm_fast.diffusion import sampling
from pvdm_fast.models import Denoiser
from pvdm_fast.sample import main
from pvdm_fast.train import main as train
from pvdm_fast.training.config import make_config


def run_sample(run: Path, out: Path, *arguments: str) -> int:
    return main([str(run), "--out", str(out), "--steps", "2", "--clips", "2", "--device", "cpu", *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["mp4", "npy"])
def test_memory_does_not_grow_with_the_length(
    suffix: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first step of each clip, as many bytes of tensors and arrays are alive as at the third clip's."""
    alive: list[int] = []
    original = sampling.sample_latents

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        kinds = {torch.Tensor, torch.nn.Parameter, np.ndarray}
        alive.append(sum(item.nbytes for item in gc.get_objects() if type(item) in kinds))
        return original(*arguments, **options)

    monkeypatch.setattr(sampling, "sample_latents", counted)
    assert run_sample(finished, tmp_path / f"out.{suffix}", "--frames", "32", "--steps", "1") == 0
    assert len(alive) == 8
    assert len(set(alive[2:])) == 1, alive
    assert alive[-1] > 50_000, "the models' weights at least are counted"


def test_a_clip_is_written_before_the_next_is_sampled(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third clip: the writer has got two clips of frames, and leaves nothing behind."""
    written: list[int] = []
    original, rounds = sampling.sample_latents, []

    def interrupted(*arguments: Any, **options: Any) -> torch.Tensor:
        rounds.append(sum(written))
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    def noted(videos: list[np.ndarray], columns: int) -> np.ndarray:
        written.append(len(videos[0]))
        return videos[0]

    monkeypatch.setattr(sampling, "sample_latents", interrupted)
    monkeypatch.setattr("pvdm_fast.data.sampled_videos.arrange", noted)
    assert run_sample(finished, tmp_path / "out.mp4", "--frames", "40") == 130
    assert rounds == [0, 4, 8]
    assert not list(tmp_path.iterdir())


def test_the_array_is_all_of_sample_video(finished: Path, tmp_path: Path) -> None:
    """Both suffixes hold the frames of sample_video, with the last clip cut."""
    assert run_sample(finished, tmp_path / "out.npy", "--frames", "10", "--seed", "4") == 0
    models = sample.load_models(finished, "cpu", "fp32")
    expected = sampling.sample_video(*models, clips=2, frames=10, steps=2, seed=4)
    pixels = expected.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
    assert np.array_equal(np.load(tmp_path / "out.npy"), pixels)
    assert run_sample(finished, tmp_path / "out.mp4", "--frames", "10", "--seed", "4") == 0
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 10
    assert abs(float(frames[9][:16].mean()) - float(pixels[0, 9].mean())) < 5


def test_a_full_disk_is_one_sentence(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("npy", "mp4"):
        (tmp_path / f"out.{suffix}").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for suffix in ("npy", "mp4"):
        assert run_sample(finished, tmp_path / f"out.{suffix}", "--overwrite") == 2
        assert "No space left on device" in capsys.readouterr().err
        assert (tmp_path / f"out.{suffix}").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_a_given_video_is_continued(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films = []
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", draw_scene(np.random.default_rng(number), 1.5).render(12, 32, 48))
        films.append(["--condition", str(tmp_path / f"{number}.mp4")])
    outs = []
    for name, arguments in (("a", films[0]), ("again", films[0]), ("b", films[1]), ("c", [*films[0], "--stride", "3"])):
        assert run_sample(finished, tmp_path / f"{name}.npy", *arguments) == 0
        outs.append(np.load(tmp_path / f"{name}.npy"))
    assert outs[0].shape == (2, 4, 16, 16, 3)
    assert np.array_equal(outs[0], outs[1])
    assert not np.array_equal(outs[0], outs[2]) and not np.array_equal(outs[0], outs[3])
    capsys.readouterr()
    assert run_sample(finished, tmp_path / "d.npy", *films[0], "--stride", "4") == 2
    assert "it has 12 frames, but the model's clip of 4, every 4th one, takes 13" in capsys.readouterr().err
    assert not (tmp_path / "d.npy").exists()


def test_what_exists_is_written_over_only_where_that_is_asked_for(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.npy"
    out.write_bytes(b"old")
    assert run_sample(finished, out) == 2
    assert f"{out} already exists: name another file with --out, or write over it with --overwrite" in (
        capsys.readouterr().err
    )
    assert out.read_bytes() == b"old"
    assert run_sample(finished, out, "--overwrite", "--steps", "1") == 0
    assert np.load(out).shape == (2, 4, 16, 16, 3)


CLASSES = ("Rising", "apart", "Boxing")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos named as in UCF-101, where each class has one brightness."""
    folder = tmp_path_factory.mktemp("films")
    for number, label in enumerate(CLASSES):
        (folder / label).mkdir()
        for group in range(1, 5):
            film = np.full((9, 16, 16, 3), 40 + 80 * number, np.uint8)
            write_video(folder / label / f"v_{label}_g{group:02}_c01.avi".replace("avi", "mp4"), film)
    return folder


@pytest.mark.slow
def test_a_run_with_classes(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes go from file names to the denoiser, a moved folder keeps their numbers, and samples have a class."""
    run = tmp_path / "run"
    arguments = ["--data", str(films), "--diffusion-class-conditional", "--run", str(run)]
    assert train([*SMALL, *steps(3), *arguments]) == 0
    denoiser = Denoiser.from_pretrained(run / "denoiser")
    assert denoiser.config["num_classes"] == 3
    assert list(denoiser.config["class_names"]) == ["apart", "Boxing", "Rising"]
    assert run_sample(run, tmp_path / "a.npy", "--class", "Boxing", "--guidance", "1") == 0
    assert run_sample(run, tmp_path / "b.npy", "--class", "1", "--guidance", "1") == 0
    assert run_sample(run, tmp_path / "c.npy", "--class", "2", "--guidance", "1") == 0
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    capsys.readouterr()
    assert run_sample(run, tmp_path / "d.npy", "--class", "Diving") == 2
    assert "no class 'Diving'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_moved_folder_with_fewer_classes(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    options = ["--stage", "autoencoder", "--data", str(films), "--diffusion-class-conditional", "--run", str(run)]
    assert train([*SMALL, *steps(1), *options]) == 0
    (run / "classes.json").write_text('["apart", "Boxing"]')
    assert train(["--resume", str(run), "--stage", "diffusion", "--diffusion-steps", "9"]) == 2
    assert "classes that the denoiser doesn't know: Rising" in capsys.readouterr().err
    moved.mkdir()
    for label in ("apart", "Boxing"):
        (moved / label).symlink_to(films / label)
    assert train(["--resume", str(run), "--stage", "diffusion", "--data", str(moved)]) == 0


def test_data_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the autoencoder trains."""
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", draw_scene(np.random.default_rng(number)).render(16, 16, 16))
    for stage in ("autoencoder", "all"):
        options = ["--data", str(tmp_path), "--stage", stage, "--diffusion-class-conditional"]
        assert train([*SMALL, *options, "--run", str(tmp_path / "run")]) == 2
        assert f"no classes in {tmp_path}" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert make_config({"data": str(tmp_path)}).diffusion.class_conditional is False
    assert make_config({}).diffusion.class_conditional is True
    assert make_config({"preset": "release"}).diffusion.class_conditional is False


@pytest.mark.slow
def test_rendered_scenes_are_sampled_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classes in turn, with the guidance that the run has, unless something else is asked for."""
    run = tmp_path / "run"
    options = ["--diffusion-class-conditional", "--diffusion-sampling-guidance", "1.5", "--stage", "all"]
    assert train([*SMALL, *steps(1), *options, "--run", str(run)]) == 0
    denoiser = Denoiser.from_pretrained(run / "denoiser")
    assert list(denoiser.config["class_names"]) == sorted(KINDS) and denoiser.config["sampling_guidance"] == 1.5
    randomised(denoiser).save_pretrained(run / "denoiser")

    def sampled(name: str, *options: str) -> np.ndarray:
        out = tmp_path / f"{name}.npy"
        assert run_sample(run, out, "--clips", "6", "--batch-size", "2", *options) == 0
        return np.load(out)

    usual = sampled("usual")
    assert np.array_equal(usual, sampled("guided", "--guidance", "1.5"))
    assert np.array_equal(usual[4:], sampled("two", "--clips", "2", "--clips-from", "4"))
    assert not np.array_equal(usual, sampled("plain", "--guidance", "0"))
    assert not np.array_equal(usual, sampled("none", "--class", "none"))
    capsys.readouterr()
    assert run_sample(run, tmp_path / "nothing.npy", "--class", "none", "--guidance", "1") == 2
    assert "--guidance has nothing to follow" in capsys.readouterr().err
    ring = sampled("ring", "--class", "ring")
    assert [np.array_equal(a, b) for a, b in zip(usual, ring, strict=True)] == [False, False, True, False, False, False]


@pytest.mark.parametrize("suffix", ["mp4", "gif", "npy"])
def test_pieces_make_the_same_file(suffix: str, tmp_path: Path) -> None:
    film = draw_scene(np.random.default_rng(0), 1.0).render(11, 17, 18)
    write_video(tmp_path / f"whole.{suffix}", film, 12)
    with open_video(tmp_path / f"pieces.{suffix}", 12) as write:
        for first, last in ((0, 1), (1, 8), (8, 11)):
            write(film[first:last])
    assert (tmp_path / f"whole.{suffix}").read_bytes() == (tmp_path / f"pieces.{suffix}").read_bytes()
    with open_video(tmp_path / f"more.{suffix}") as write:
        write(film)
        with pytest.raises(ValueError, match="as before"):
            write(film[:, :16])
    with pytest.raises(ValueError, match="no frames"), open_video(tmp_path / f"empty.{suffix}"):
        pass
    assert not (tmp_path / f"empty.{suffix}").exists()

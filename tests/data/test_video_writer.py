"""Video files are complete or absent, have the same bytes each time, and show the right frames."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data import films
from PIL import Image

from pvdm_fast.data import open_video, video_grid, write_video


def psnr(left: np.ndarray, right: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((left.astype(float) - right) ** 2), 1e-9)))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63), (17, 32), (1, 1), (16, 5)])
def test_mp4_keeps_frames_and_pads_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    film = films.frames(9, 48, 64)[:, :height, :width]
    write_video(tmp_path / "a.mp4", film, fps=12.5)
    read = np.stack(films.decode_all(tmp_path / "a.mp4"))
    assert read.shape == (9, height + height % 2, width + width % 2, 3)
    if min(height, width) > 8:
        assert psnr(read[:, :height, :width], film) > 24  # colour is stored at half the resolution
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12.5
        assert container.streams.video[0].format.name == "yuv420p"


def test_without_x264_mpeg4_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    film = films.frames(9)
    write_video(tmp_path / "a.mp4", film)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert psnr(np.stack(films.decode_all(tmp_path / "a.mp4")), film) > 24


def test_gif(tmp_path: Path) -> None:
    film = films.frames(7)
    write_video(tmp_path / "a.gif", film, fps=10)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 7
        assert picture.info["duration"] == 100
        assert picture.info["loop"] == 0
        picture.seek(3)
        assert psnr(np.asarray(picture.convert("RGB")), film[3]) > 25


def test_npy(tmp_path: Path) -> None:
    film = films.frames(3)
    write_video(tmp_path / "a.npy", film)
    assert (np.load(tmp_path / "a.npy") == film).all()


WRITE_ALL = """
import sys
import numpy as np
from pvdm_fast.data import write_video
for suffix in ("mp4", "gif", "npy"):
    write_video(f"{sys.argv[2]}.{suffix}", np.load(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """In new processes, whose memory starts with different garbage: x264 once read it."""
    np.save(tmp_path / "film.npy", films.frames(16, 34, 34))
    for rubbish in ("85", "255"):
        subprocess.run(
            [sys.executable, "-c", WRITE_ALL, str(tmp_path / "film.npy"), str(tmp_path / rubbish)],
            env={**os.environ, "MALLOC_PERTURB_": rubbish},
            check=True,
        )
    for suffix in ("mp4", "gif", "npy"):
        assert (tmp_path / f"85.{suffix}").read_bytes() == (tmp_path / f"255.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", ["mp4", "gif", "npy"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_video(path, films.frames(3))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    for suffix in ("mp4", "gif", "npy"):
        with pytest.raises(OSError, match="No such file"):
            write_video(tmp_path / "nowhere" / f"a.{suffix}", films.frames(2))


@pytest.mark.parametrize(
    ("name", "film", "fps", "message"),
    [
        ("a.avi", films.frames(2), 8, "must end in"),
        ("a.mp4", films.frames(2).astype(np.float32), 8, "expected uint8"),
        ("a.mp4", films.frames(2)[0], 8, "expected uint8"),
        ("a.mp4", films.frames(2)[:0], 8, "no size 0"),
        ("a.mp4", films.frames(2), 0, "fps must be positive"),
    ],
)
def test_wrong_arguments(tmp_path: Path, name: str, film: np.ndarray, fps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, film, fps)
    with pytest.raises(ValueError, match=r"crf is the quality of H\.264"), open_video(tmp_path / "a.gif", crf=20):
        pass


def test_a_grid_places_videos_row_by_row() -> None:
    videos = torch.stack([torch.full((3, 2, 4, 6), value) for value in (-1.0, 0.0, 1.0)])
    videos[2, 0] = -3.0  # out of range: clamped
    grid = video_grid(videos, columns=2, gap=1)
    assert grid.shape == (2, 9, 13, 3)
    assert grid.dtype == np.uint8
    assert (grid[:, :4, :6] == 0).all()
    assert (grid[:, :4, 7:] == 128).all()
    assert (grid[:, 5:, :6] == (0, 255, 255)).all()
    assert (grid[:, 5:, 7:] == 0).all()


def test_a_grid_is_no_wider_than_its_videos_and_takes_any_dtype() -> None:
    assert video_grid(torch.zeros(2, 3, 1, 4, 4, dtype=torch.bfloat16), columns=8, gap=0).shape == (1, 4, 8, 3)
    with pytest.raises(ValueError, match="expected videos"):
        video_grid(torch.zeros(3, 1, 4, 4), columns=2)

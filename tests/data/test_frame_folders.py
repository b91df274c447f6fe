"""Folders of pictures: their order, and how every kind of pixel becomes RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pvdm_fast.data.errors import UnreadableVideo
from pvdm_fast.data.frame_folders import list_frames, read_picture

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOURS = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def test_frames_come_in_natural_order(tmp_path: Path) -> None:
    for name in ("f10.png", "f9.png", "f100.PNG", "f1.png", "f09b.png"):
        save(tmp_path / name, COLOURS)
    (tmp_path / ".f2.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no frame")
    assert [path.name for path in list_frames(tmp_path)] == ["f1.png", "f9.png", "f09b.png", "f10.png", "f100.PNG"]


@pytest.mark.parametrize(
    ("suffix", "exact"), [("png", True), ("bmp", True), ("tif", True), ("webp", True), ("jpg", False)]
)
def test_colour_pictures(tmp_path: Path, suffix: str, exact: bool) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    large = np.kron(COLOURS, np.ones((4, 4, 1), np.uint8))
    read = read_picture(save(tmp_path / f"a.{suffix}", large, **options))
    assert read.shape == large.shape
    assert read.dtype == np.uint8
    assert np.abs(read.astype(int) - large).mean() <= (0 if exact else 8)


def test_grey_is_repeated(tmp_path: Path) -> None:
    assert (read_picture(save(tmp_path / "a.png", RAMP)) == RAMP[..., None]).all()


def test_sixteen_bit_grey_keeps_its_upper_half(tmp_path: Path) -> None:
    deep = RAMP.astype(np.uint16) * 256 + 77
    for suffix in ("png", "tif"):
        assert (read_picture(save(tmp_path / f"a.{suffix}", deep)) == RAMP[..., None]).all()


def test_one_bit_pictures(tmp_path: Path) -> None:
    Image.fromarray(RAMP > 100).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png") == np.where(RAMP > 100, 255, 0)[..., None]).all()


def test_alpha_is_laid_over_black(tmp_path: Path) -> None:
    alpha = np.zeros((6, 8, 1), np.uint8)
    alpha[:, 4:] = 255
    read = read_picture(save(tmp_path / "a.png", np.concatenate([COLOURS, alpha], axis=-1)))
    assert (read[:, :4] == 0).all()
    assert (read[:, 4:] == COLOURS[:, 4:]).all()
    half = np.full((6, 8, 2), 128, np.uint8)  # grey with alpha
    assert (np.abs(read_picture(save(tmp_path / "b.png", half)).astype(int) - 64) <= 1).all()


def test_palettes_with_and_without_a_transparent_colour(tmp_path: Path) -> None:
    picture = Image.fromarray((RAMP // 64).astype(np.uint8), mode=None).convert("P")
    picture.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9, 0, 255, 0])
    picture.putdata([0, 1] * 24)
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png", transparency=1)
    assert (read_picture(tmp_path / "a.png")[0, :2] == [(10, 20, 30), (200, 100, 50)]).all()
    assert (read_picture(tmp_path / "b.png")[0, :2] == [(10, 20, 30), (0, 0, 0)]).all()


@pytest.mark.parametrize("content", [b"", b"a text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_damaged_picture_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(UnreadableVideo, match=r"bad\.png cannot be decoded"):
        read_picture(tmp_path / "bad.png")


def test_floating_point_pictures_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", RAMP.astype(np.float32))
    with pytest.raises(UnreadableVideo, match="floating-point"):
        read_picture(tmp_path / "a.tif")

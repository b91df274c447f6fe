"""Damage of every kind ends in frames or in a reason, never in a crash or another exception."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from data import films
from PIL import Image

from pvdm_fast.data import DataError, open_dataset
from pvdm_fast.data.errors import UnreadableVideo
from pvdm_fast.data.frame_folders import read_picture

MUTATIONS = int(os.environ.get("PVDM_FAST_TEST_MUTATIONS", "25"))  # per kind of file
FILES = {
    "a.mp4": ("libx264", {"bframes": 2}),
    "b.avi": ("mpeg4", {}),
    "c.mkv": ("libx264", {"bframes": 2}),
    "d.ts": ("mpeg2video", {"bframes": 2}),
    "e.webm": ("libvpx-vp9", {"options": {"cpu-used": "8", "deadline": "realtime"}}),
    "f.gif": ("gif", {}),
}


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Truncated, overwritten, with a piece cut out or repeated, or with single bytes changed."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 3))):
        low, high = sorted(int(place) for place in rng.integers(0, len(data) + 1, 2))
        high = min(high, low + 1 + int(rng.integers(400)))
        kind = rng.integers(5)
        if kind == 0:
            del data[max(low, 1) :]
        elif kind == 1:
            data[low:high] = rng.bytes(high - low)
        elif kind == 2:
            del data[low:high]
        elif kind == 3:
            data[low:low] = data[low:high]
        else:
            for place in rng.integers(0, len(data), 2):
                data[place] ^= 1 << int(rng.integers(8))
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_damaged_videos(tmp_path: Path, name: str) -> None:
    codec, settings = FILES[name]
    whole = films.encode(tmp_path / name, films.frames(20), codec, **settings).read_bytes()
    rng = np.random.default_rng(len(whole))
    outcomes = {"clip": 0, "reason": 0}
    for _ in range(MUTATIONS):
        (tmp_path / name).write_bytes(damage(whole, rng))
        try:
            item = open_dataset(tmp_path / name, frames=4, height=16, width=16)[1]
        except DataError:
            outcomes["reason"] += 1
        else:
            assert item["video"].shape == (3, 4, 16, 16)
            outcomes["clip"] += 1
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about the damage
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_damaged_pictures(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(films.frames(1)[0]).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(len(whole))
    for _ in range(MUTATIONS):
        path.write_bytes(damage(whole, rng))
        try:
            assert read_picture(path).shape[2] == 3
        except UnreadableVideo:
            continue

"""Videos made once per session. Tests read them and never change them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data import films

from pvdm_fast.data import loader


@pytest.fixture(scope="session")
def film() -> np.ndarray:
    """uint8 (60, 48, 64, 3)."""
    return films.frames(60)


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of 20 frames, 48 x 64, in several containers."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "nested").mkdir()
    for seed, name in enumerate(["a.mp4", "b.mkv", "c.avi", "nested/d.mov", "nested/e.mp4", "nested/f.mp4"]):
        films.encode(folder / name, films.frames(20, seed=seed))
    return folder


@pytest.fixture(autouse=True)
def _ask_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are looked at every five seconds. These tests need not wait that long."""
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.2)

"""What every version of PyAV that is allowed must agree on. `.ci/oldest` runs the tests with the oldest ones."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from data import films

from pvdm_fast.data.video_reader import packet_index, read_frames


@pytest.mark.parametrize(("space", "expected"), [("bt709", (254, 0, 0)), ("smpte170m", (233, 0, 2))])
def test_colours_are_those_of_the_files_own_matrix(tmp_path: Path, space: str, expected: tuple[int, int, int]) -> None:
    """Y, U, V = 63, 102, 240 is pure red by BT.709, and (233, 0, 2) by BT.601, which PyAV before 17 always used."""
    luma, blue, red = np.full((32, 32), 63), np.full((16, 16), 102), np.full((16, 16), 240)
    planes = np.concatenate([plane.astype(np.uint8).ravel() for plane in (luma, blue, red)]).reshape(48, 32)
    numbers = {"bt709": 1, "smpte170m": 6}
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = numbers[space]
        stream.codec_context.color_range = 1
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    path = tmp_path / "a.mkv"
    (pixels,) = read_frames(path, packet_index(path), [1], lambda frame: frame)
    assert np.abs(pixels[16, 16].astype(int) - expected).max() <= 3


def test_the_reader_agrees_with_the_films(tmp_path: Path) -> None:
    film = films.frames(4)
    path = films.encode(tmp_path / "a.mkv", film, "ffv1")
    found = read_frames(path, packet_index(path), range(4), lambda frame: frame)
    assert np.abs(np.stack(found).astype(int) - film).mean() < 2

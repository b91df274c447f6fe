"""Small videos and files for the tests, made on the spot."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def frames(count: int = 30, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """uint8 (count, height, width, 3): a bright square crosses soft waves, and every frame is different."""
    rows, columns = np.mgrid[:height, :width]
    film = np.empty((count, height, width, 3), np.uint8)
    for number in range(count):
        wave = 60 + 40 * np.sin(0.2 * columns + 0.3 * number + seed) + 20 * np.cos(0.15 * rows)
        film[number] = wave[..., None] + np.array([0, 20, 40])
        top, left = (3 * number) % (height - 8), (5 * number + 7 * seed) % (width - 8)
        film[number, top : top + 8, left : left + 8] = (250, 40 + 5 * (number % 40), 200)
    return film


def encode(
    path: Path,
    film: np.ndarray,
    codec: str = "mpeg4",
    *,
    gop: int = 8,
    bframes: int = 0,
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
    faststart: bool = False,
) -> Path:
    """Write a video with key frames every ``gop`` frames. ``times`` are presentation times in 1/100 s."""
    settings = {"g": str(gop), "bf": str(bframes), **(options or {})}
    if codec == "libx264":
        settings = {"sc_threshold": "0", "preset": "veryfast", **settings}
    with av.open(str(path), "w", options={"movflags": "+faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=Fraction(100 if times else 25), options=settings)
        stream.height, stream.width = film.shape[1:3]
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8", "ffv1": "yuv444p"}.get(codec, "yuv420p")
        stream.codec_context.thread_count = 1
        for number, array in enumerate(film):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_all(path: Path) -> list[np.ndarray]:
    """Every frame of a file, decoded from the start without the reader under test."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

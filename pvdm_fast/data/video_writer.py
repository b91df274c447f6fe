"""Write frames as mp4, gif or npy; the same frames give the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

# x264's macroblock tree reads memory it never wrote: with it the bytes change from one run to the next.
X264_OPTIONS = {"crf": "18", "x264-params": "mbtree=0"}


def write_video(path: str | Path, frames: np.ndarray, fps: float = 8) -> None:
    """Write uint8 ``frames`` (T, H, W, 3) to ``path``, its format chosen by the suffix .mp4, .gif or .npy.

    mp4: H.264, or MPEG-4 part 2 where PyAV comes without libx264; odd sizes are padded by one row or column. gif: 256
    colours a frame, the duration of a frame rounded to 10 ms. npy: the array itself.
    The file appears whole or not at all. Raises ValueError for other suffixes and shapes, OSError when it cannot be
    written.
    """
    path = Path(path)
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".npy": _write_npy}
    if path.suffix.lower() not in writers:
        raise ValueError(f'cannot write "{path.name}": the name must end in {", ".join(writers)}')
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"expected uint8 frames (T, H, W, 3), none of them 0, got {frames.dtype} {frames.shape}")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    write = writers[path.suffix.lower()]
    _atomically(path, lambda temporary: write(temporary, frames, fps))


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Run ``write`` on a temporary name beside ``path``, flush it to the disk, rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    import av

    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    codec, options = ("libx264", X264_OPTIONS) if "libx264" in av.codecs_available else ("mpeg4", {"qscale": "2"})
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes depend on the number of threads
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    from PIL import Image

    first, *rest = (Image.fromarray(array).quantize(256) for array in frames)
    duration = max(10, round(100 / fps) * 10)
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)


def _write_npy(path: Path, frames: np.ndarray, fps: float) -> None:
    with open(path, "wb") as file:  # given a name, np.save would append a suffix
        np.save(file, frames)


def video_grid(videos: torch.Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Videos (B, 3, T, H, W) in [-1, 1] side by side: uint8 frames (T, rows, columns of pixels, 3), black between."""
    if videos.ndim != 5 or videos.shape[1] != 3 or columns < 1:
        raise ValueError(f"expected videos (B, 3, T, H, W) and columns >= 1, got {tuple(videos.shape)}, {columns}")
    pixels = videos.detach().float().add(1).mul(127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    count, _, frames, height, width = videos.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = torch.zeros(frames, rows * (height + gap) - gap, columns * (width + gap) - gap, 3, dtype=torch.uint8)
    for number, video in enumerate(pixels):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        grid[:, top : top + height, left : left + width] = video.permute(1, 2, 3, 0)
    return grid.numpy()

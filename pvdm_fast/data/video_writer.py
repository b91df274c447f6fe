"""Write frames as mp4, gif, npy or a folder of png, all at once or as they come. The same frames give the same
bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pvdm_fast.jobs.files import whole_folder

# x264's macroblock tree reads uninitialised memory. With it the bytes change from run to run.
X264_OPTIONS = {"x264-params": "mbtree=0"}
DEFAULT_CRF = 18  # x264's constant rate factor: 0 is lossless, 23 its own default, 51 the worst

Write = Callable[[np.ndarray], None]


def write_video(path: str | Path, frames: np.ndarray, fps: float = 8) -> None:
    """Write uint8 ``frames`` (T, H, W, 3) to ``path``: `open_video` when all frames are there."""
    _check_frames(frames)
    with open_video(path, fps) as write:
        write(frames)


@contextmanager
def open_video(path: str | Path, fps: float = 8, crf: int | None = None) -> Iterator[Write]:
    """Write a video as its frames come. Gives a function that appends uint8 frames (T, H, W, 3), all of one size.

    The suffix chooses the format. .mp4: H.264 of quality ``crf`` (18 by default), or MPEG-4 part 2 if PyAV has no
    libx264. Odd sizes are padded by one row or column. .gif: 256 colours per frame, frame durations rounded to 10 ms.
    Pillow writes it at the end, so its frames are kept until then, one byte per pixel. .npy: one array of all frames.
    The file is the same however you split the frames into pieces. It appears when the block ends, complete. If the
    block raises, no file appears. Raises ValueError for other suffixes and shapes and for a ``crf`` where there is no
    H.264, OSError if the file can't be written.
    """
    path = Path(path)
    formats: dict[str, Callable[[Path, float], AbstractContextManager[Write]]]
    formats = {".mp4": partial(_mp4, crf=crf), ".gif": _gif, ".npy": _npy}
    if path.suffix.lower() not in formats:
        raise ValueError(f'cannot write "{path.name}": the name must end in {", ".join(formats)}')
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps must be positive, from 0.01 to 1000, got {fps}")
    if crf is not None and not (path.suffix.lower() == ".mp4" and has_x264()):
        raise ValueError(f'crf is the quality of H.264, which "{path.name}" would not be: leave it out')
    size: tuple[int, ...] | None = None
    with whole_video(path) as temporary, formats[path.suffix.lower()](temporary, fps) as append:

        def write(frames: np.ndarray) -> None:
            nonlocal size
            _check_frames(frames)
            if size is not None and frames.shape[1:] != size:
                raise ValueError(f"expected frames of {size} as before, got {frames.shape[1:]}")
            size = frames.shape[1:]
            append(frames)

        yield write
        if size is None:
            raise ValueError(f'no frames were written to "{path.name}"')


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"expected uint8 frames (T, H, W, 3), no size 0, got {frames.dtype} {frames.shape}")


@contextmanager
def whole_video(path: Path) -> Iterator[Path]:
    """A temporary name next to ``path``. What you write there is flushed to the disk and renamed, or on errors
    removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def has_x264() -> bool:
    """Whether mp4 files are H.264: whether PyAV was built with libx264."""
    import av

    return "libx264" in av.codecs_available


@contextmanager
def open_frames(folder: Path) -> Iterator[Write]:
    """Write a video as a folder of pictures, 000000.png and so on, as its frames come. The folder appears when the
    block ends, complete. An older one stays until then."""
    from PIL import Image

    count = 0
    with whole_folder(folder) as temporary:

        def write(frames: np.ndarray) -> None:
            nonlocal count
            _check_frames(frames)
            for array in frames:
                Image.fromarray(array).save(temporary / f"{count:06}.png")
                count += 1

        yield write


@contextmanager
def _mp4(path: Path, fps: float, crf: int | None) -> Iterator[Write]:
    import av

    x264 = {"crf": str(DEFAULT_CRF if crf is None else crf), **X264_OPTIONS}
    codec, options = ("libx264", x264) if has_x264() else ("mpeg4", {"qscale": "2"})
    with av.open(os.path.abspath(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes depend on the number of threads

        def write(frames: np.ndarray) -> None:
            height, width = frames.shape[1:3]
            frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = frames.shape[1:3]
            for array in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))

        yield write
        if stream.codec_context.is_open:
            container.mux(stream.encode())


@contextmanager
def _gif(path: Path, fps: float) -> Iterator[Write]:
    from PIL import Image

    pictures: list[Image.Image] = []
    yield lambda frames: pictures.extend(Image.fromarray(array).quantize(256) for array in frames)
    if pictures:
        duration = max(10, round(100 / fps) * 10)
        first, *rest = pictures
        first.save(path, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)


@contextmanager
def _npy(path: Path, fps: float) -> Iterator[Write]:
    with open(path, "wb") as file:
        shape: list[int] = []

        def header() -> None:
            """numpy leaves room in it for the first axis to grow, so it can be rewritten in place."""
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})

        def write(frames: np.ndarray) -> None:
            if not shape:
                shape.extend((0, *frames.shape[1:]))
                header()
            shape[0] += len(frames)
            file.write(np.ascontiguousarray(frames).data)

        yield write
        if shape:
            file.seek(0)
            header()


def video_grid(videos: torch.Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Videos (B, 3, T, H, W) in [-1, 1] side by side with black in between: uint8 frames (T, pixel rows, pixel
    columns, 3)."""
    if videos.ndim != 5 or videos.shape[1] != 3 or columns < 1:
        raise ValueError(f"expected videos (B, 3, T, H, W) and columns >= 1, got {tuple(videos.shape)}, {columns}")
    return arrange(list(to_pixels(videos)), columns, gap)


def to_pixels(videos: torch.Tensor) -> np.ndarray:
    """Videos (B, 3, T, H, W) in [-1, 1] as uint8 frames (B, T, H, W, 3)."""
    pixels = videos.detach().float().add(1).mul(127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous().numpy()


def arrange(videos: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Videos uint8 (T, H, W, 3), all of one shape, side by side with black in between: uint8 frames (T, pixel rows,
    pixel columns, 3)."""
    frames, height, width, colours = videos[0].shape
    columns = min(columns, len(videos))
    rows = -(-len(videos) // columns)
    grid = np.zeros((frames, rows * (height + gap) - gap, columns * (width + gap) - gap, colours), np.uint8)
    for number, video in enumerate(videos):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        grid[:, top : top + height, left : left + width] = video
    return grid

"""The end of a video that you give, as the clip that samples continue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pvdm_fast.data.draws import View
from pvdm_fast.data.errors import DataError, UnreadableVideo
from pvdm_fast.data.frame_folders import list_frames, read_picture
from pvdm_fast.data.transforms import fit, to_video
from pvdm_fast.data.video_reader import IndexMismatch, counted_index, packet_index, read_frames
from pvdm_fast.data.watch import reading
from pvdm_fast.jobs.reading import READ_TIMEOUT


def last_clip(path: str | Path, *, frames: int, height: int, width: int, stride: int = 1) -> torch.Tensor:
    """The last ``frames`` frames of a video file or a folder of frames, ``stride`` apart, up to the very last one.

    They are cropped at the centre and resized like clips of the test split: float32 (1, 3, frames, height, width) in
    [-1, 1]. Raises `DataError` if the video is too short or can't be read.
    """
    path = Path(path)
    if stride < 1:
        raise DataError(f"the step between the frames of the given video must be at least 1, not {stride}")
    if not path.exists():
        raise DataError(f"there is no video {path}")
    if not path.is_file() and not path.is_dir():
        raise DataError(f"cannot continue {path}: it is a pipe or a device, not a video file or a folder of frames")
    try:
        with reading(str(path), READ_TIMEOUT):
            return fit_clip(_last_frames(path, frames, stride), height, width)
    except UnreadableVideo as reason:
        raise DataError(f"cannot continue {path}: {reason}") from reason


def fit_clip(frames: Sequence[np.ndarray], height: int, width: int) -> torch.Tensor:
    """Crops uint8 frames (h, w, 3) at the centre and resizes them: float32 (1, 3, frames, height, width) in [-1,
    1]."""
    return to_video([fit(frame, height, width, View()) for frame in frames])[None]


def _last_frames(path: Path, frames: int, stride: int) -> list[np.ndarray]:
    if path.is_dir():
        pictures = list_frames(path)
        return [read_picture(pictures[number]) for number in _last(len(pictures), frames, stride)]
    for build in (packet_index, counted_index):
        index = build(path)
        try:
            return read_frames(path, index, _last(index.frames, frames, stride), lambda frame: frame)
        except IndexMismatch:
            continue
    raise UnreadableVideo("it gives different frames each time it is decoded")


def only_one(frames: int) -> str:
    """What is wrong with a single picture as a condition of a model that continues clips of ``frames`` frames."""
    return (
        "a single picture, and this model has only learned to go on from a whole clip: give a video of at least "
        f"{frames} frames"
    )


def _last(total: int, frames: int, stride: int) -> range:
    """The numbers of the last frames of a video of ``total`` frames."""
    span = (frames - 1) * stride + 1
    if total == 1 < frames:
        raise UnreadableVideo(f"it is {only_one(frames)}")
    if total < span:
        every = f", every {stride}th one," if stride > 1 else ""
        raise UnreadableVideo(f"it has {total} frames, but the model's clip of {frames}{every} takes {span}")
    return range(total - span, total, stride)

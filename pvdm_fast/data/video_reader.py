"""Frames of a video file by number, through PyAV: seeks to the key frame before a window and decodes from there.

Frame i of a video is the i-th in order of presentation. Reading the packets once, without decoding, gives every
frame's time stamp (:class:`VideoIndex`), so neither a constant frame rate nor the frame count of the header is
relied on. Where time stamps are missing, repeat or do not match what the decoder delivers, frames are counted from
the start of the file instead: slower, never wrong.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pvdm_fast.data.errors import UnreadableVideo

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_PIXELS = 1 << 26  # 8192 x 8192: beyond it a header is taken to be damaged rather than memory filled
T = TypeVar("T")


class IndexMismatch(Exception):
    """The decoder did not deliver the frames that the packets announced."""


@dataclass(frozen=True)
class VideoIndex:
    """Which frames a video has.

    ``pts``: int64 (frames,), increasing presentation times in stream time base, or None where only counting helps.
    ``keys``: int64, increasing, the times of key frames (where decoding can begin).
    """

    frames: int
    pts: np.ndarray | None = None
    keys: np.ndarray | None = None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream, decoding on one thread; any failure is an UnreadableVideo."""
    import av

    try:
        # Only local files: a playlist posing as a video must not make the decoder open addresses.
        container = av.open(str(path.absolute()), options={"protocol_whitelist": "file"})
    except Exception as error:  # whatever a damaged file provokes, it is a reason to skip it
        raise UnreadableVideo(f"cannot be opened: {_reason(error)}") from error
    with container:
        if not container.streams.video:
            raise UnreadableVideo("has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UnreadableVideo("its video codec is unknown to this FFmpeg")
        stream.codec_context.thread_count = 1
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            raise UnreadableVideo(f"frames of {stream.codec_context.width} x {stream.codec_context.height} pixels")
        try:
            yield container, stream
        except (UnreadableVideo, IndexMismatch):
            raise
        except Exception as error:  # as above: decoders raise many types
            raise UnreadableVideo(f"cannot be decoded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def packet_index(path: Path) -> VideoIndex:
    """Frame times from the packets of a file, without decoding; by counting where packets have no usable times."""
    pts: list[int | None] = []
    keys: list[int | None] = []
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:  # the end marker; frames cut away by an edit list
                continue
            pts.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    times = [time for time in pts if time is not None]
    if not pts:
        raise UnreadableVideo("holds no frames")
    if len(set(times)) != len(pts):
        return counted_index(path)
    return VideoIndex(len(times), np.sort(np.array(times, np.int64)), np.sort(np.array(keys, np.int64)))


def counted_index(path: Path) -> VideoIndex:
    """The number of frames the decoder really delivers, found by decoding the whole file."""
    with _opened(path) as (container, stream):
        frames = sum(1 for _ in container.decode(stream))
    if frames == 0:
        raise UnreadableVideo("holds no frames")
    return VideoIndex(frames)


def read_frames(path: Path, index: VideoIndex, wanted: Sequence[int], each: Callable[[np.ndarray], T]) -> list[T]:
    """``each`` applied to the wanted frames (increasing numbers), given as uint8 (height, width, 3) RGB arrays.

    Raises :class:`IndexMismatch` when the time stamps of ``index`` do not lead to the frames, and
    :class:`UnreadableVideo` when they cannot be decoded.
    """
    if index.pts is None or index.keys is None:
        return _read_counting(path, wanted, each)
    times = [int(index.pts[number]) for number in wanted]
    with _opened(path) as (container, stream):
        for key in _entry_points(index.keys, times[0]):
            found = _read_from(container, stream, key, times, each)
            if found is not None:
                return found
    raise IndexMismatch


def _entry_points(keys: np.ndarray, first: int) -> list[int | None]:
    """Where to begin decoding: the last key frame not after ``first``, the one before it, the start (None)."""
    position = bisect_right(keys, first)
    return [int(keys[at]) for at in (position - 1, position - 2) if at > 0] + [None]


def _read_from(
    container: InputContainer, stream: VideoStream, key: int | None, times: list[int], each: Callable[[np.ndarray], T]
) -> list[T] | None:
    """Decode from a key frame until all times are met; None when this entry point does not lead to them."""
    found: dict[int, T] = {}
    wanted = set(times)
    try:
        if key is not None:
            container.seek(key, stream=stream, backward=True)
        for frame in _decoded(container, stream, None if key is None else times[0]):
            if frame.pts in wanted and frame.pts not in found:
                found[frame.pts] = each(_rgb(frame))
                if len(found) == len(times):
                    return [found[time] for time in times]
    except (OSError, ValueError):  # broken seek or a damaged stretch before the window: the next entry point decides
        if key is None:
            raise
    if key is None:
        return None
    container.seek(0, stream=stream, backward=True)
    return None


def _decoded(container: InputContainer, stream: VideoStream, entry_limit: int | None) -> Iterator[VideoFrame]:
    """Frames from where the container stands; after a seek, none unless it stands at a key frame before the limit."""
    entered = entry_limit is None
    for packet in container.demux(stream):
        if not entered:
            if not packet.is_keyframe:
                continue
            if packet.pts is None or packet.pts > (entry_limit or 0):
                return
            entered = True
        yield from packet.decode()


def _read_counting(path: Path, wanted: Sequence[int], each: Callable[[np.ndarray], T]) -> list[T]:
    """The wanted frames by counting from the start of the file."""
    found: list[T] = []
    numbers = set(wanted)
    with _opened(path) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                found.append(each(_rgb(frame)))
                if len(found) == len(numbers):
                    return found
    raise UnreadableVideo(f"ends before frame {wanted[-1]}")


def _rgb(frame: VideoFrame) -> np.ndarray:
    """The frame as uint8 (height, width, 3), upright; damaged frames are refused."""
    if frame.is_corrupt:
        raise UnreadableVideo(f"a damaged frame at {frame.time} s")
    if frame.width * frame.height > MAX_PIXELS:
        raise UnreadableVideo(f"frames of {frame.width} x {frame.height} pixels")
    rgb: np.ndarray = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # phones store frames lying down, with the angle beside them
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


class IndexCache:
    """Indices of the files read last, at most ``budget`` frames altogether, so that files are scanned once."""

    def __init__(self, budget: int = 4_000_000) -> None:
        self.budget = budget
        self.entries: OrderedDict[tuple[str, Any], VideoIndex] = OrderedDict()
        self.frames = 0

    def get(self, path: Path, build: Callable[[Path], VideoIndex]) -> VideoIndex:
        key = (str(path), build)
        if key in self.entries:
            self.entries.move_to_end(key)
            return self.entries[key]
        index = self.entries[key] = build(path)
        self.frames += index.frames
        while self.frames > self.budget and len(self.entries) > 1:
            self.frames -= self.entries.popitem(last=False)[1].frames
        return index

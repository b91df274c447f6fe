"""Frames of a video file by number, through PyAV: seeks to the key frame before a window and decodes from there.

Frame i of a video is the i-th in order of presentation. Reading the packets once, without decoding, gives every frame's
time stamp (`VideoIndex`). So nothing relies on a constant frame rate, or on the frame count in the header. If time
stamps are missing, repeat, or don't match the decoded frames, frames are counted from the start of the file. That is
slower, but never wrong.
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from pvdm_fast.data.errors import UnreadableVideo, unreadable
from pvdm_fast.data.frame_folders import MAX_PIXELS, over_black

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
T = TypeVar("T")
Source = Path | bytes  # a file, or its contents


class IndexMismatch(Exception):
    """The decoder didn't deliver the frames that the packets announced."""


@dataclass(frozen=True)
class VideoIndex:
    """Which frames a video has.

    ``pts``: int64 (frames,), increasing presentation times in the stream's time base, or None if frames must be
    counted.
    ``keys``: int64, increasing numbers of the key frames, where decoding can begin. The first is 0. None with ``pts``.
    """

    frames: int
    pts: np.ndarray | None = None
    keys: np.ndarray | None = None


@contextmanager
def _opened(source: Source) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream, decoding on one thread. Any failure becomes an UnreadableVideo."""
    import av

    try:
        # Only local files: a playlist that poses as a video must not make the decoder open addresses.
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source.absolute())
        container = av.open(file, "r", options={"protocol_whitelist": "file"})
    except Exception as error:  # a damaged file can raise anything; it is skipped
        raise unreadable("cannot be opened", error) from error
    with container:
        stream = next((stream for stream in container.streams.video if not _is_cover(stream)), None)
        if stream is None:
            raise UnreadableVideo("has no video stream")
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
            raise unreadable("cannot be decoded", error) from error


def _is_cover(stream: VideoStream) -> bool:
    """Whether a stream is a still picture about the video, such as the cover of a song."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _decoder(stream: VideoStream) -> Callable[[Packet[VideoStream]], list[VideoFrame]]:
    """Decodes a stream's packets. FFmpeg's own decoders of VP8 and VP9 ignore WebM's transparency."""
    import av

    name = ALPHA_DECODERS.get(stream.codec_context.name)
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if name is None or tags.get("alpha_mode") != "1":
        return lambda packet: packet.decode()
    if name not in av.codecs_available:
        raise UnreadableVideo(f"is transparent, and this PyAV comes without {name}, which reads that")
    context: Any = av.CodecContext.create(name, "r")
    context.extradata, context.thread_count = stream.codec_context.extradata, 1
    return lambda packet: context.decode(packet if packet.size else None)


def packet_index(source: Source) -> VideoIndex:
    """Frame times from the packets of a file, without decoding. If packets have no usable times, frames are counted.

    Frames before the first key frame can't be decoded. They are left out, like frames that an edit list cuts.
    """
    pts: list[int | None] = []
    keys: list[int] = []
    with _opened(source) as (container, stream):
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard or packet.is_corrupt:
                continue
            pts.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
    times = sorted({time for time in pts if time is not None})
    if not keys or len(times) != len(pts):
        return counted_index(source)
    decodable = np.array(times[bisect_left(times, min(keys)) :], np.int64)
    return VideoIndex(len(decodable), decodable, np.searchsorted(decodable, np.unique(keys)))


def counted_index(source: Source) -> VideoIndex:
    """The number of frames that the decoder really delivers, found by decoding the whole file."""
    with _opened(source) as (container, stream):
        frames = sum(1 for _ in container.decode(stream))
    if frames == 0:
        raise UnreadableVideo("holds no frames")
    return VideoIndex(frames)


def read_frames(source: Source, index: VideoIndex, wanted: Sequence[int], each: Callable[[np.ndarray], T]) -> list[T]:
    """``each`` of the wanted frames (increasing numbers). It gets them as uint8 (height, width, 3) RGB arrays.

    Raises `IndexMismatch` if the time stamps of ``index`` don't lead to the frames, and `UnreadableVideo` if they can't
    be decoded.
    """
    if index.pts is None or index.keys is None:
        return _read_counting(source, wanted, each)
    for target in _seek_targets(index.keys, wanted[0]):
        found = _read_from(source, index.pts, target, wanted, each)
        if found is not None:
            return found
    raise IndexMismatch


@contextmanager
def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Iterator[Packet[VideoStream]]]:
    """The packets of a stream, from a generator of PyAV that is closed here.

    If such a generator (or container.decode's) is dropped before its end, PyAV 18.1 leaks 150 bytes of native memory.
    That is a kilobyte per training step.
    """
    packets = cast("Generator[Packet[VideoStream]]", container.demux(stream))
    try:
        yield packets
    finally:
        packets.close()


def _seek_targets(keys: np.ndarray, first: int) -> list[int]:
    """Frame numbers to seek to, best first: key frames farther and farther before ``first``, then 0, the start.

    Some containers (MPEG-TS, MPEG-PS) land a little after the requested place, so a seek may miss the nearest key
    frame.
    """
    nearest = bisect_right(keys, first) - 1
    return [int(keys[at]) for at in (nearest, nearest - 1, nearest - 3) if at > 0] + [0]


def _read_from(
    source: Source, pts: np.ndarray, target: int, wanted: Sequence[int], each: Callable[[np.ndarray], T]
) -> list[T] | None:
    """Seek to frame ``target`` and decode to the last wanted frame. None if that doesn't lead there.

    Every frame on the way must have its time stamp from the index. Otherwise the stamps can't be trusted: H.264 in AVI,
    for example, has them in coding order.
    """
    found: list[T] = []
    numbers = set(wanted)
    try:
        with _opened(source) as (container, stream), _packets(container, stream) as packets:
            if target:
                container.seek(int(pts[target]), stream=stream, backward=True)
            key = next((packet for packet in packets if packet.is_keyframe), None)
            if key is None or key.pts is None or key.pts > pts[wanted[0]]:
                return None
            number = bisect_left(pts, key.pts)
            decode, screen = _decoder(stream), _Screen(stream)
            for frame in (frame for packet in chain([key], packets) for frame in decode(packet)):
                screen.look(frame)
                if frame.pts is not None and frame.pts < key.pts:
                    continue  # shown before the key frame, but based on frames before that
                if frame.pts != pts[number]:
                    return None
                if number in numbers:
                    found.append(each(screen.show(frame)))
                if number == wanted[-1]:
                    return found
                number += 1
    except UnreadableVideo:  # a misleading seek, or damage before the window: decoding from the start decides
        if target == 0:
            raise
    return None


def _read_counting(source: Source, wanted: Sequence[int], each: Callable[[np.ndarray], T]) -> list[T]:
    """The wanted frames, counted from the start of the file."""
    found: list[T] = []
    numbers = set(wanted)
    with _opened(source) as (container, stream), _packets(container, stream) as packets:
        decode, screen = _decoder(stream), _Screen(stream)
        for number, frame in enumerate(frame for packet in packets for frame in decode(packet)):
            screen.look(frame)
            if number in numbers:
                found.append(each(screen.show(frame)))
                if len(found) == len(numbers):
                    return found
    raise UnreadableVideo(f"ends before frame {wanted[-1]}")


class _Screen:
    """Shows a stream's frames as its file intends: square pixels, transparency over black, turned and mirrored.

    A display matrix turns by quarters and mirrors. Phones store videos that were filmed in portrait lying on their
    side, and front cameras store mirror images. The matrix takes column x and row y to column a x + c y and row b x + d
    y. Some streams have it only at key frames.
    """

    def __init__(self, stream: VideoStream) -> None:
        aspect = stream.sample_aspect_ratio
        self.pixel = Fraction(aspect) if aspect else Fraction(1)  # width over height of a pixel: not 1 for DV and DVD
        self.matrix: tuple[int, int, int, int] | None = None

    def look(self, frame: VideoFrame) -> None:
        """Note what a frame says, even if it isn't wanted."""
        from av.sidedata.sidedata import SideDataContainer, Type

        # Not frame.side_data: the frame keeps it, in a cycle of references. Frames would stay until the garbage
        # collector came, together with the threads that scaled them. In a forked worker the collector would wait for
        # threads that don't exist there.
        found = SideDataContainer(frame).get(Type.DISPLAYMATRIX)  # type: ignore[call-arg]  # its stubs lack it
        if found is not None:
            a, b, _, c, d = np.frombuffer(bytes(found), np.int32)[:5].tolist()
            self.matrix = (a, b, c, d)

    def show(self, frame: VideoFrame) -> np.ndarray:
        """The frame as uint8 (height, width, 3), in its own memory. Damaged frames raise."""
        if frame.is_corrupt:
            raise UnreadableVideo(f"a damaged frame at {frame.time} s")
        width, height = frame.width, frame.height
        if self.pixel > 1:  # the shorter side grows, so nothing is lost
            width = round(width * self.pixel)
        elif self.pixel < 1:
            height = round(height / self.pixel)
        if width * height > MAX_PIXELS:
            raise UnreadableVideo(f"frames of {width} x {height} pixels")
        square: dict[str, Any] = (
            {} if self.pixel == 1 else {"width": width, "height": height, "interpolation": "BICUBIC"}
        )
        if frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components):
            return self._turned(over_black(frame.to_ndarray(format="rgba", **square)))
        return self._turned(frame.to_ndarray(format="rgb24", **square))

    def _turned(self, rgb: np.ndarray) -> np.ndarray:
        if self.matrix is None:
            return rgb
        a, b, c, d = self.matrix
        if abs(a * d) < abs(b * c):  # rows become columns
            rgb, a, d = rgb.swapaxes(0, 1), c, b
        if a < 0:
            rgb = rgb[:, ::-1]
        if d < 0:
            rgb = rgb[::-1]
        return np.ascontiguousarray(rgb)


class IndexCache:
    """The indices of the most recent files, at most ``budget`` frames in total, so that files are scanned once."""

    def __init__(self, budget: int = 4_000_000) -> None:
        self.budget = budget
        self.entries: OrderedDict[tuple[str, Any], VideoIndex] = OrderedDict()
        self.frames = 0

    def get(self, place: str, source: Source, build: Callable[[Source], VideoIndex]) -> VideoIndex:
        """The index of the video at ``place``. If it isn't known, it is made from ``source``."""
        key = (place, build)
        if key in self.entries:
            self.entries.move_to_end(key)
            return self.entries[key]
        index = self.entries[key] = build(source)
        self.frames += index.frames
        while self.frames > self.budget and len(self.entries) > 1:
            self.frames -= self.entries.popitem(last=False)[1].frames
        return index

"""A frame read by number is the frame that a full decode puts there, bit for bit, in any container."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from data import films

from pvdm_fast.data import video_reader
from pvdm_fast.data.errors import UnreadableVideo
from pvdm_fast.data.video_reader import IndexCache, IndexMismatch, VideoIndex, packet_index, read_frames

UNEVEN = [int(time) for time in np.cumsum(np.random.default_rng(0).integers(1, 20, 60))]
OPEN_GOP = {"x264-params": "open-gop=1"}
SEEKABLE = {
    "h264 with b frames.mp4": ("libx264", {"bframes": 3}),
    "h264, open groups.mp4": ("libx264", {"bframes": 3, "options": OPEN_GOP}),
    "h264, key frames only.mp4": ("libx264", {"gop": 1}),
    "h264, uneven times.mp4": ("libx264", {"bframes": 2, "times": UNEVEN}),
    "mpeg4.mp4": ("mpeg4", {}),
    "mpeg4 with b frames.mp4": ("mpeg4", {"bframes": 2}),
    "h264.mkv": ("libx264", {"bframes": 3}),
    "uneven times.mkv": ("libx264", {"bframes": 2, "times": UNEVEN}),
    "vp8 with hidden frames.webm": (
        "libvpx",
        {"options": {"auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "5"}},
    ),
    "vp9.webm": ("libvpx-vp9", {"options": {"cpu-used": "8", "deadline": "realtime"}}),
    "xvid like ucf.avi": ("mpeg4", {}),
    "mpeg4 with b frames.avi": ("mpeg4", {"bframes": 2}),
    "mjpeg.avi": ("mjpeg", {}),
    "broadcast.ts": ("libx264", {"bframes": 2}),
    "old.mpg": ("mpeg2video", {"bframes": 2}),
    "windows.wmv": ("wmv2", {}),
    "flash.flv": ("flv", {}),
    "lossless.nut": ("ffv1", {}),
    "animation.gif": ("gif", {}),
}
COUNTED = {
    "coding order for time.avi": ("libx264", {"bframes": 2}),
    "no times at all.h264": ("libx264", {"bframes": 2}),
}


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and bool((left == right).all())


def make(folder: Path, name: str, film: np.ndarray, cases: dict[str, tuple[str, dict[str, Any]]]) -> Path:
    codec, settings = cases[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}: install PyAV from PyPI")
    return films.encode(folder / name, film, codec, **settings)


@pytest.mark.parametrize("name", SEEKABLE)
def test_seeking_finds_the_frames_of_a_full_decode(tmp_path: Path, film: np.ndarray, name: str) -> None:
    path = make(tmp_path, name, film, SEEKABLE)
    whole = films.decode_all(path)
    index = packet_index(path)
    assert index.pts is not None
    assert index.frames == len(whole) == len(film)
    for start in (0, 1, 7, 8, 9, 22, 40, 54):
        wanted = range(start, start + 5, 2)
        for number, frame in zip(wanted, read_frames(path, index, wanted, np.copy), strict=True):
            assert same(frame, whole[number]), f"frame {number}"
    assert same(read_frames(path, index, [59], np.copy)[0], whole[59])


@pytest.mark.parametrize("name", COUNTED)
def test_without_true_time_stamps_frames_are_counted(tmp_path: Path, film: np.ndarray, name: str) -> None:
    path = make(tmp_path, name, film, COUNTED)
    whole = films.decode_all(path)
    index = packet_index(path)
    if index.pts is not None:
        with pytest.raises(IndexMismatch):
            read_frames(path, index, range(20, 30), np.copy)
        index = video_reader.counted_index(path)
    assert index == VideoIndex(60)
    for number, frame in zip(range(20, 30), read_frames(path, index, range(20, 30), np.copy), strict=True):
        assert same(frame, whole[number])


def test_a_late_window_is_read_without_decoding_what_lies_before(
    tmp_path: Path, film: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = films.encode(tmp_path / "film.mp4", film, "libx264", bframes=2)
    entered: list[int] = []
    read_from = video_reader._read_from

    def spy(path: Path, pts: np.ndarray, target: int, *rest: Any) -> Any:
        entered.append(target)
        return read_from(path, pts, target, *rest)

    monkeypatch.setattr(video_reader, "_read_from", spy)
    read_frames(path, packet_index(path), [50], np.copy)
    assert entered == [48]


def test_when_seeking_fails_the_start_of_the_file_is_the_second_try(
    tmp_path: Path, film: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = films.encode(tmp_path / "film.mp4", film, "libx264", bframes=2)
    index = packet_index(path)
    assert index.pts is not None
    whole = films.decode_all(path)
    # Seek targets after the window, as from a container whose seeks mislead.
    monkeypatch.setattr(video_reader, "_seek_targets", lambda keys, first: [56, 48, 0])
    assert same(read_frames(path, index, [30], np.copy)[0], whole[30])


def test_a_phone_video_is_turned_upright(tmp_path: Path) -> None:
    film = films.frames(4, 32, 48)
    path = films.encode(tmp_path / "phone.mp4", film)
    upright = films.decode_all(path)[0]
    content = path.read_bytes()
    at = content.index(b"tkhd") + 4 + 40
    quarter_turn = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]  # clockwise
    matrix = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter_turn)
    path.write_bytes(content[:at] + matrix + content[at + 36 :])
    turned = read_frames(path, packet_index(path), [0], np.copy)[0]
    assert same(turned, np.rot90(upright, -1))


def test_a_truncated_film_is_read_as_far_as_it_goes(tmp_path: Path, film: np.ndarray) -> None:
    path = films.encode(tmp_path / "cut.mp4", film, faststart=True)
    whole = films.decode_all(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    index = packet_index(path)
    assert 20 < index.frames < 60
    for number, frame in enumerate(read_frames(path, index, range(index.frames), np.copy)):
        assert same(frame, whole[number])


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "cannot be opened"), (b"just a text\n" * 50, "cannot be opened")]
)
def test_what_is_no_video_gives_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "no.mp4").write_bytes(content)
    with pytest.raises(UnreadableVideo, match=reason):
        packet_index(tmp_path / "no.mp4")


def test_a_playlist_posing_as_a_video_opens_no_address(tmp_path: Path) -> None:
    path = tmp_path / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://192.0.2.1/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(UnreadableVideo):
        packet_index(path)


def test_sound_alone_has_no_video_stream(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UnreadableVideo, match="no video stream"):
        packet_index(path)


def test_the_index_cache_forgets_the_least_used_and_counts_frames() -> None:
    built: list[Path] = []

    def build(path: Path) -> VideoIndex:
        built.append(path)
        return VideoIndex(40)

    cache = IndexCache(budget=100)
    first, second, third = Path("1"), Path("2"), Path("3")
    for path in (first, second, first, third, first, second):
        cache.get(str(path), path, build)
    assert built == [first, second, third, second]
    assert cache.frames == 80


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc 2.33 or newer: run on a newer Linux"
)
@pytest.mark.slow
@pytest.mark.parametrize("counting", [False, True])
def test_reading_a_part_loses_no_memory(tmp_path: Path, film: np.ndarray, counting: bool) -> None:
    path = make(tmp_path, "h264.mkv", film, SEEKABLE)
    index = packet_index(path)
    index = VideoIndex(index.frames) if counting else index
    malloc = ctypes.CDLL(None)
    malloc.mallinfo2.restype = Mallinfo

    def taken(reads: int) -> int:
        """Bytes that malloc has handed out after some more reads."""
        for _ in range(reads):
            read_frames(path, index, [1], np.copy)
        gc.collect()
        return malloc.mallinfo2().uordblks

    before = taken(100)
    assert taken(300) - before < 300 * 75  # half of what PyAV leaked when a generator of packets was only dropped

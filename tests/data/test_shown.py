"""Pictures as their files say they should be shown: turned, mirrored, with square pixels, over black."""

from __future__ import annotations

import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data import films
from PIL import Image

from pvdm_fast.data import make_loader, open_dataset
from pvdm_fast.data.errors import UnreadableVideo
from pvdm_fast.data.frame_folders import read_picture
from pvdm_fast.data.transforms import to_float, to_pixels
from pvdm_fast.data.video_reader import _Screen, packet_index, read_frames

FILM = films.frames(6, 48, 64)
SIXTEEN = 1 << 16
# EXIF's eight orientations, and the equivalent display matrices (a, b, c, d).
SHOWN = {
    1: ((1, 0, 0, 1), lambda p: p),
    2: ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    3: ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    4: ((1, 0, 0, -1), lambda p: p[::-1]),
    5: ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    6: ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    7: ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    8: ((0, -1, 1, 0), lambda p: np.rot90(p)),
}


def with_matrix(path: Path, film: np.ndarray, matrix: tuple[int, ...]) -> Path:
    """An mp4 with this matrix in its track header. The muxer writes the identity, which this finds and replaces."""
    films.encode(path, film, "libx264", options={"crf": "0"})
    identity = np.array([SIXTEEN, 0, 0, 0, SIXTEEN, 0, 0, 0, 1 << 30], ">i4").tobytes()
    a, b, c, d = (SIXTEEN * value for value in matrix)
    content = path.read_bytes()
    place = content.index(identity, content.index(b"tkhd"))
    new = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(content[:place] + new + content[place + len(new) :])
    return path


def read(path: Path, wanted: list[int]) -> list[np.ndarray]:
    return read_frames(path, packet_index(path), wanted, lambda frame: frame)


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this PyAV has no libx264")
@pytest.mark.parametrize("orientation", SHOWN)
def test_display_matrices(orientation: int, tmp_path: Path) -> None:
    matrix, shown = SHOWN[orientation]
    plain = read(films.encode(tmp_path / "p.mp4", FILM, "libx264", options={"crf": "0"}), [0, 4])
    for frame, found in zip(plain, read(with_matrix(tmp_path / "m.mp4", FILM, matrix), [0, 4]), strict=True):
        assert np.array_equal(found, shown(frame)) and found.flags.c_contiguous


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_orientations_of_pictures(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.kron(FILM[0], np.ones((4, 4, 1), np.uint8)))
    options = {"lossless": True} if suffix == "webp" else {}
    picture.save(tmp_path / f"plain.{suffix}", **options)
    picture.save(tmp_path / f"turned.{suffix}", exif=exif, **options)
    plain, turned = (read_picture(tmp_path / f"{name}.{suffix}") for name in ("plain", "turned"))
    assert np.array_equal(turned, SHOWN[orientation][1](plain))


@pytest.mark.parametrize(("aspect", "size"), [((2, 1), (48, 128)), ((1, 2), (96, 64)), ((16, 15), (48, 68))])
def test_pixels_become_square(aspect: tuple[int, int], size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "a.y4m"  # its header says it in plain text
    planes = [av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv444p") for frame in FILM]
    header = f"YUV4MPEG2 W64 H48 F25:1 Ip A{aspect[0]}:{aspect[1]} C444\n".encode()
    path.write_bytes(header + b"".join(b"FRAME\n" + frame.to_ndarray().tobytes() for frame in planes))
    (found,) = read(path, [2])
    assert found.shape == (*size, 3)
    resized = np.asarray(Image.fromarray(FILM[2]).resize((size[1], size[0]), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found - resized).mean() < 3


def half_red(path: Path, codec: str, kind: str, **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 32, 32, kind
        for _ in range(4):
            pixels = np.full((32, 32, 4), (255, 0, 0, 128), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "kind", "options"),
    [
        ("a.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        ("b.mov", "qtrle", "argb", {}),
        ("c.mov", "png", "rgba", {}),
        ("d.mkv", "ffv1", "bgra", {}),
        ("e.webm", "libvpx-vp9", "yuva420p", {"crf": "4", "b": "0"}),
        ("f.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0", "crf": "4", "b": "4M"}),
    ],
)
def test_transparent_videos_lie_over_black(
    name: str, codec: str, kind: str, options: dict[str, str], tmp_path: Path
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    for frame in read(half_red(tmp_path / name, codec, kind, **options), [0, 3]):
        assert np.abs(frame.astype(int) - (128, 0, 0)).max() <= 6


def test_a_cover_is_not_the_video(tmp_path: Path) -> None:
    """The first video stream is an attached picture."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("png", rate=25)
        cover.height, cover.width, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        film = container.add_stream("mpeg4", rate=25)
        film.height, film.width, film.pix_fmt = 48, 64, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        for frame in FILM:
            container.mux(film.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(film.encode())
    (found,) = read(path, [3])
    assert found.shape == (48, 64, 3) and np.abs(found.astype(int) - FILM[3]).mean() < 12


def test_frames_are_not_kept(tmp_path: Path) -> None:
    """There are no reference cycles: with the garbage collector off, no scaler's thread stays behind."""
    import gc

    path = films.encode(tmp_path / "a.mp4", FILM)
    read(path, [0, 5])
    gc.collect()
    gc.disable()
    try:
        before = len(list(Path("/proc/self/task").iterdir()))
        for _ in range(5):
            read(path, list(range(6)))
        assert len(list(Path("/proc/self/task").iterdir())) <= before + 2
        assert gc.collect() < 200
    finally:
        gc.enable()
    assert threading.active_count() >= 1 and _Screen


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "cannot be decoded"),
        (b"P6 2 2 255\n" + b"x" * 12, "cannot"),
    ],
)
def test_only_formats_of_pictures_are_tried(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableVideo, match=reason):
        read_picture(tmp_path / "a.png")


def test_a_jpeg_called_png_is_read(tmp_path: Path) -> None:
    Image.fromarray(FILM[0]).save(tmp_path / "a.png", format="JPEG")
    assert read_picture(tmp_path / "a.png").shape == (48, 64, 3)


def test_pictures_have_the_limit_that_videos_have(tmp_path: Path) -> None:
    Image.new("1", (8200, 8200)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableVideo, match="8200 x 8200 pixels"):
        read_picture(tmp_path / "a.png")


def test_floats_are_the_same_to_the_bit() -> None:
    """As numpy made them before clips travelled as pixels. Goldens and resumed runs depend on it."""
    levels = np.arange(256, dtype=np.uint8)
    before = np.divide(levels, np.float32(127.5), dtype=np.float32)
    before -= 1
    assert np.array_equal(to_float(torch.from_numpy(levels)).numpy(), before)
    latents = torch.randn(3)
    assert to_float(latents) is latents


def test_clips_cross_from_workers_as_pixels(tmp_path: Path) -> None:
    for number in range(3):
        films.encode(tmp_path / f"{number}.mp4", films.frames(8, seed=number))
    dataset = open_dataset(tmp_path, frames=4, height=16, width=16, flip=True)
    for workers in (0, 1):
        raw, whole = (
            next(iter(make_loader(dataset, batch_size=3, workers=workers, pixels=pixels))) for pixels in (True, False)
        )
        assert raw["video"].dtype == torch.uint8 and raw["video"].nbytes * 4 == whole["video"].nbytes
        assert torch.equal(to_float(raw["video"]), whole["video"])
        assert torch.equal(whole["video"], torch.stack([dataset[draw]["video"] for draw in range(3)]))
    assert to_pixels(FILM).shape == (3, 6, 48, 64)

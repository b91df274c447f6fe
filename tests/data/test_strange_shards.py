"""Shards and folders of latents whose headers lie are refused with a reason, quickly, and without using memory."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from data import films

from pvdm_fast.data import DataError, open_dataset
from pvdm_fast.data.continuation import last_clip
from pvdm_fast.data.latent_shards import _array, open_shard
from pvdm_fast.data.latents import FORMAT, is_latents, read_index
from pvdm_fast.data.shards import list_shards, scan

wds = pytest.importorskip("webdataset")
SIZE = {"frames": 4, "height": 16, "width": 16}
SECONDS = 10


def shard(path: Path, samples: int = 2) -> Path:
    video = films.encode(path.with_name("v.mp4"), films.frames(8)).read_bytes()
    path.with_name("v.mp4").unlink()
    with wds.TarWriter(str(path), mtime=0) as writer:
        for number in range(samples):
            writer.write({"__key__": f"c{number}", "mp4": video})
    return path


def with_size(path: Path, size: int, member: int = 0) -> None:
    """One member's header with another size (base 256 if octal digits don't suffice), and a correct checksum."""
    with tarfile.open(path) as archive:
        place = archive.getmembers()[member].offset
    content = bytearray(path.read_bytes())
    head = content[place : place + 512]
    head[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    content[place : place + 512] = head
    path.write_bytes(content)


def refused(path: Path) -> str:
    started = time.monotonic()
    with pytest.raises(DataError, match=r"the shard .* cannot be read") as caught:
        scan(path)
    assert time.monotonic() - started < SECONDS
    return str(caught.value)


@pytest.mark.parametrize("size", [-512, -1, -(1 << 40), 1 << 40, 1 << 62])
@pytest.mark.parametrize("member", [0, 1])
def test_sizes_that_cannot_be(size: int, member: int, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar")
    with_size(path, size, member)
    assert "bytes" in refused(path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_as_large_as_a_disk(kind: bytes, tmp_path: Path) -> None:
    with open(tmp_path / "a.tar", "wb") as file:
        head = tarfile.TarInfo("x")
        head.type, head.size = kind, 1 << 34
        file.write(head.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 35)  # sparse, so it takes no space
    assert "a header of" in refused(tmp_path / "a.tar")


def test_a_damaged_header_in_the_middle_is_named(tmp_path: Path) -> None:
    """tarfile would take it for the end, and half of the data would be missing."""
    path = shard(tmp_path / "a.tar", 4)
    with tarfile.open(path) as archive:
        place = archive.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[place + 100] ^= 1
    path.write_bytes(content)
    assert f"a damaged header at byte {place}" in refused(path)


def test_a_chain_of_headers(tmp_path: Path) -> None:
    head = tarfile.TarInfo("x").create_pax_global_header({"a": "b"})
    (tmp_path / "a.tar").write_bytes(head * 20_000)
    started = time.monotonic()
    with pytest.raises(DataError):
        open_dataset(tmp_path / "a.tar", **SIZE)
    assert time.monotonic() - started < SECONDS


def test_one_entry_listed_60000_times(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.txt").tobuf()
    (tmp_path / "a.tar").write_bytes(member * 60_000 + bytes(1024))
    started = time.monotonic()
    ((key, _, _, suffixes),) = scan(tmp_path / "a.tar")
    assert (key, len(suffixes)) == ("a", 60_000) and time.monotonic() - started < 3 * SECONDS


def test_patterns_and_pipes(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match="more than 100000 shards"):
        list_shards(f"{tmp_path}/{{0..9999999}}.tar")
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError):
        list_shards(tmp_path / "a.tar")
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(DataError, match="a pipe or a device"):
        last_clip(tmp_path / "a.mp4", **SIZE)
    assert time.monotonic() - started < SECONDS


def test_archives_beside_the_videos_they_came_from(tmp_path: Path) -> None:
    for number in range(3):
        films.encode(tmp_path / f"{number}.mp4", films.frames(8, seed=number))
    (tmp_path / "download.tar").write_bytes(b"half of it")
    (tmp_path / "settings.json").write_text('{"fps": 25}')
    found = open_dataset(tmp_path, **SIZE)
    assert "folder of videos" in found.description and found.left_out == "1 .json file, 1 .tar file"
    shard(tmp_path / "download.tar")
    with pytest.raises(DataError, match="both shards with videos"):
        open_dataset(tmp_path, **SIZE)


def npy(shape: tuple[int, ...], content: bytes) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def test_arrays_that_say_more_than_they_have() -> None:
    assert (_array(npy((2, 3), np.arange(6, dtype="<f4").tobytes())) == np.arange(6).reshape(2, 3)).all()
    for shape in ((1 << 40,), (1 << 31, 1 << 31), (2, 4)):
        with pytest.raises(ValueError, match="bytes"):
            _array(npy(shape, bytes(24)))


def test_a_shard_that_begins_with_a_pipe_or_nonsense(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is not a file"):
        open_shard(tmp_path / "a.safetensors")


SETTINGS = {
    "autoencoder": "a", "data": "d", "description": "", "frames": 4, "height": 8, "width": 8, "stride": 1, "seed": 0,
    "flip": False, "windows": 2, "channels": 4, "tokens": 12, "train_clips": 0, "test_clips": 0, "shard_clips": 2,
    "container": "safetensors", "format": FORMAT,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"train_clips": 10**15}, {"train_clips": -1}, {"shard_clips": 0}, {"windows": 1.5}, {"frames": "4"}, {"flip": 1},
     {"container": "x/../../y"}, {"unknown": 1}, {"data": None}],
)  # fmt: skip
def test_an_index_is_compared_with_the_folder(change: dict[str, object], tmp_path: Path) -> None:
    index = {"settings": {**SETTINGS, **change}, "labels": []}
    (tmp_path / "index.json").write_text(json.dumps(index))
    started = time.monotonic()
    with pytest.raises(DataError, match=r"cannot read .*index\.json"):
        read_index(tmp_path)
    assert time.monotonic() - started < SECONDS
    (tmp_path / "index.json").write_text(json.dumps({"settings": SETTINGS, "labels": []}))
    assert read_index(tmp_path).frames == 4


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"settings": 1}', '{"settings": {}}', "\x00"])
def test_an_index_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match="cannot read"):
        read_index(tmp_path)


def test_settings_of_something_else_make_no_latents(tmp_path: Path) -> None:
    for content in ('{"fps": 1}', "[]", "{broken"):
        (tmp_path / "settings.json").write_text(content)
        assert not is_latents(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(DataError, match="not complete"):
        is_latents(tmp_path)

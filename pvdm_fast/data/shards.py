"""Videos in webdataset shards: ``.tar`` files in which members with the same key and different suffixes form a sample.

Shards are uncompressed files on a disk, a network file system or a mounted bucket, not streams. Their headers are read
once to find each sample. After that a draw reads only its own sample. So the order depends on the draw number, as for
any other data, and ranks and workers share the draws.
"""

from __future__ import annotations

import io
import math
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from pvdm_fast.data.draws import generator, is_held_out
from pvdm_fast.data.errors import DataError, UnreadableVideo, unreadable
from pvdm_fast.data.layouts import Found
from pvdm_fast.data.listing import VIDEO_SUFFIXES, Video
from pvdm_fast.jobs.reading import file_clock, open_regular

SHUFFLED_SHARDS = 16  # shuffled together: a rank reads from this many shards at a time
MAX_SHARDS = 100_000
MAX_HEADER = 1 << 20  # bytes, for long names and PAX records; the longest path has 4096
_BLOCK = 512
_BRACES = re.compile(r"\{.*\}")


def library() -> ModuleType:
    """webdataset, which defines what a sample is. Raises `DataError` if it isn't installed."""
    try:
        import webdataset
    except ImportError as error:
        raise DataError("shards (.tar) need the package webdataset: pip install 'pvdm-fast[webdataset]'") from error
    return webdataset


@dataclass(frozen=True)
class Sample(Video):
    """A video inside a shard. ``path`` is the shard's, and the sample's members lie from ``begin`` to ``end``."""

    begin: int = 0
    end: int = 0

    @property
    def place(self) -> str:
        return f"{self.path.parent}/{self.name}"


def list_shards(source: str | Path) -> list[Path] | None:
    """The shards that a pattern such as ``shards/{0000..0099}.tar``, a folder of .tar files or one file names.

    None if ``source`` is none of these. Raises `DataError` for URLs and for missing files.
    """
    text, path = str(source), Path(source)
    if text.endswith(".tar") and re.match(r"(\w+://|pipe:)", text):
        raise DataError(f"{text}: shards must be files, because any part may be read next: mount the bucket, or copy")
    if text.endswith(".tar") and _BRACES.search(text):
        library()
        from braceexpand import braceexpand

        ends = re.findall(r"\{(-?\d+)\.\.(-?\d+)", text)
        many = math.prod(abs(int(last) - int(first)) + 1 for first, last in ends) > MAX_SHARDS
        shards = [] if many else [Path(name) for name in islice(braceexpand(text), MAX_SHARDS + 1)]
        if many or len(shards) > MAX_SHARDS:
            raise DataError(f"{text} stands for more than {MAX_SHARDS} shards")
    elif path.suffix == ".tar":
        shards = [path]
    elif path.is_dir():
        try:
            shards = sorted(item for item in path.iterdir() if item.suffix == ".tar" and item.name[0] != ".")
        except OSError as error:
            raise DataError(f"{path} cannot be listed: {error.strerror}") from error
    else:
        return None
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of the {len(shards)} shards of {text} are not there, first {missing[0]}")
    if not shards:
        return None
    library()
    return shards


Place = tuple[str, int, int, tuple[str, ...]]


def scan(shard: Path) -> tuple[Place, ...]:
    """Key, first byte, end and suffixes of each sample of a shard, from its headers alone, by the library's rules.

    A process scans a shard once, unless it changes.
    """
    library()
    try:
        state = shard.stat()
    except OSError as error:
        raise DataError(f"the shard {shard} cannot be read: {error.strerror}") from error
    return _scan(shard, state.st_size, state.st_mtime_ns)


@cache
def _scan(shard: Path, size: int, changed: int) -> tuple[Place, ...]:
    try:
        with file_clock(shard), _Headers(open_regular(shard)) as file:  # type: ignore[arg-type]
            return tuple(_samples(file, size))
    except Exception as error:  # damaged headers can raise anything: tarfile's errors, invalid numbers, endless chains
        raise DataError(
            f"the shard {shard} cannot be read ({error}): fetch it again, or take it out; compressed ones must be "
            "unpacked (gunzip)"
        ) from error


class _Headers(io.BufferedReader):
    """A file of which only headers are read. None is large, whatever size it claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _samples(file: BinaryIO, size: int) -> Iterator[Place]:
    """Where samples lie in a shard of ``size`` bytes. Every member must lie behind the one before, and inside the
    file."""
    from webdataset.tariterators import base_plus_ext, meta_prefix, meta_suffix

    key, begin, end, suffixes = None, 0, 0, list[str]()
    with tarfile.open(fileobj=file, mode="r:") as archive:
        reached = 0
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # which would be kept, a kilobyte each
            last = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            if member.size < 0 or member.offset < reached or member.offset_data + member.size > size:
                raise tarfile.ReadError(f"{member.name[:100]!r} has {member.size} bytes, the whole shard {size}")
            reached = member.offset_data
            name = member.name
            if not member.isreg() or (name.startswith(meta_prefix) and name.endswith(meta_suffix)):
                continue
            found, suffix = base_plus_ext(name)
            if found is None:
                continue
            if found != key:
                if key is not None:
                    yield key, begin, end, tuple(suffixes)
                key, begin, suffixes = found, member.offset, []
            suffixes.append(suffix.lower())
            end = min(last, size)
        file.seek(archive.offset)
        if file.read(_BLOCK).strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {archive.offset}")
    if key is not None:
        yield key, begin, end, tuple(suffixes)


def has_videos(shards: Sequence[Path]) -> bool:
    """Whether any sample of the shards has a video."""
    return any(_is_video(suffix) for shard in shards for *_, suffixes in scan(shard) for suffix in suffixes)


def find_samples(shards: Sequence[Path], split: str, usable: Callable[[Video], bool]) -> Found:
    """The samples of a split that have a video. A hash of the keys puts about a tenth into the test split."""
    samples = [
        Sample(shard, f"{shard.name}/{key}.{suffix}", False, begin, end)
        for shard in shards
        for key, begin, end, suffixes in scan(shard)
        for suffix in [suffix for suffix in suffixes if _is_video(suffix)][:1]
    ]
    if not samples:
        raise DataError(f"no sample of the {len(shards)} shards, first {shards[0]}, has a video (.mp4, .webm, ...)")
    what = f"webdataset: {len(shards)} shards"
    keys = [sample.name.split("/", 1)[1].split(".", 1)[0] for sample in samples]
    if len(set(keys)) == 1:
        return Found(list(samples), f"{what}, one video, in both splits")
    held_out = is_held_out(keys, lambda number: usable(samples[number]))
    chosen: list[Video] = [s for s, test in zip(samples, held_out, strict=True) if test == (split == "test")]
    return Found(chosen, f"{what}, {len(chosen)} of {len(samples)} videos in the {split} split (by a hash of the keys)")


def _is_video(suffix: str) -> bool:
    return f".{suffix.rsplit('.', 1)[-1]}" in VIDEO_SUFFIXES


def read_sample(sample: Sample) -> dict[str, bytes]:
    """The members of a sample by suffix. Raises UnreadableVideo."""
    library()
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        with open_regular(sample.path) as file:
            file.seek(sample.begin)
            stream = io.BytesIO(file.read(sample.end - sample.begin))
        (members,) = group_by_keys(tar_file_expander([{"url": str(sample.path), "stream": stream}]))
    except Exception as error:  # a changed or damaged shard can raise anything
        raise unreadable("cannot be read from its shard", error) from error
    return {suffix: value for suffix, value in members.items() if not suffix.startswith("__")}


def read_video(sample: Sample) -> tuple[bytes, str | None]:
    """The video's bytes, and the text of the sample's ``.cls`` if it has one."""
    members = read_sample(sample)
    suffix = next((suffix for suffix in members if _is_video(suffix)), None)
    if suffix is None:
        raise UnreadableVideo("is not in its shard any more")
    label = members.get("cls")
    return members[suffix], None if label is None else label.decode(errors="replace").strip()


@lru_cache(maxsize=4)
def shard_order(sizes: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in an epoch, for shards of these sizes: an int64 permutation, read-only.

    Shards come in random order, and the samples of 16 shards at a time are shuffled together.
    """
    rng = generator("order", seed, epoch)
    ends = np.cumsum(sizes)
    shards = rng.permutation(len(sizes))
    parts = []
    for at in range(0, len(shards), SHUFFLED_SHARDS):
        group = shards[at : at + SHUFFLED_SHARDS]
        parts.append(rng.permutation(np.concatenate([np.arange(ends[i] - sizes[i], ends[i]) for i in group])))
    order = np.concatenate(parts)
    order.flags.writeable = False
    return order

"""Feeds mutated video files to the reader, in a separate process: ``python fuzz.py FOLDER FILES [FIRST]``.

Every third file is read from a webdataset shard, and every fifth of these shards is mutated too.

Prints one line of JSON: what happened to the files, the slowest one, and the process's open files and memory at the
start and at the end. A crash, or a file that takes too long, ends the process. The current file then stays in FOLDER,
with the number from which it can be made again.
"""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import webdataset
from data import films

from pvdm_fast.data import DataError, open_dataset, shards

SECONDS = 60  # per file; then the kernel's alarm ends the process
FILES = {
    "a.mp4": ("libx264", {"bframes": 2}),
    "b.avi": ("mpeg4", {}),
    "c.webm": ("libvpx-vp9", {"options": {"cpu-used": "8", "deadline": "realtime"}}),
    "d.gif": ("gif", {}),
    "e.mkv": ("ffv1", {}),
    "f.ts": ("mpeg2video", {"bframes": 2}),
    "g.mov": ("mjpeg", {}),
}
HEADER = 2048


def flip_bits(data: bytearray, rng: np.random.Generator) -> None:
    for place in rng.integers(0, len(data), int(rng.integers(1, 40))):
        data[place] ^= 1 << int(rng.integers(8))


def flip_header_bits(data: bytearray, rng: np.random.Generator) -> None:
    for place in rng.integers(0, min(HEADER, len(data)), int(rng.integers(1, 12))):
        data[place] ^= 1 << int(rng.integers(8))


def truncate(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(1, len(data))) :]


def overwrite(data: bytearray, rng: np.random.Generator) -> None:
    """Overwrite a stretch with random bytes, zeros or ones."""
    start = int(rng.integers(len(data)))
    length = int(rng.integers(1, 200))
    fill = [rng.bytes(length), b"\0" * length, b"\xff" * length][int(rng.integers(3))]
    data[start : start + length] = fill


def cut_or_repeat(data: bytearray, rng: np.random.Generator) -> None:
    low, high = sorted(int(place) for place in rng.integers(0, len(data) + 1, 2))
    if rng.random() < 0.5:
        data[low:low] = data[low:high]
    elif high - low < len(data):
        del data[low:high]


def large_number(data: bytearray, rng: np.random.Generator) -> None:
    """Set a 4-byte field of the header to a number that breaks sizes and counts."""
    place = int(rng.integers(max(1, min(HEADER, len(data)) - 4)))
    value = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)[int(rng.integers(5))]
    data[place : place + 4] = value.to_bytes(4, ("little", "big")[int(rng.integers(2))])


MUTATIONS = (flip_bits, flip_header_bits, truncate, overwrite, cut_or_repeat, large_number)


def mutated(originals: dict[str, bytes], number: int) -> tuple[str, bytes]:
    """File number ``number``: one or two mutations, or the head of one container with the body of another."""
    rng = np.random.default_rng(number)
    name = list(originals)[number % len(originals)]
    data = bytearray(originals[name])
    if rng.random() < 0.15:
        other = bytearray(originals[list(originals)[int(rng.integers(len(originals)))]])
        head = int(rng.integers(1, HEADER))
        data = data[:head] + other[int(rng.integers(len(other))) :]
    for _ in range(int(rng.integers(1, 3))):
        MUTATIONS[int(rng.integers(len(MUTATIONS)))](data, rng)
    return name, bytes(data) or b"\0"


def packed(number: int, name: str, content: bytes) -> bytes:
    """A shard with the file as its only sample."""
    stream = io.BytesIO()
    with webdataset.TarWriter(stream, mtime=0) as writer:
        writer.write({"__key__": f"{number}-{name[0]}", name[2:]: content, "cls": number % 7})
    shard = bytearray(stream.getvalue())
    if number % 5 == 0:
        rng = np.random.default_rng([number, 1])
        MUTATIONS[int(rng.integers(len(MUTATIONS)))](shard, rng)
    return bytes(shard)


def memory() -> int:
    """This process's resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read(path: Path) -> str:
    """A training clip and a test clip of one file."""
    try:
        for split in ("train", "test"):
            item = open_dataset(path, frames=4, height=16, width=16, split=split, read_timeout=0)[1]
            if item["video"].shape != (3, 4, 16, 16) or not bool(item["video"].isfinite().all()):
                raise AssertionError(f"a wrong clip of {path}")
    except DataError:
        return "reasons"
    return "clips"


def main(folder: Path, count: int, first: int = 0) -> None:
    originals = {
        name: films.encode(folder / name, films.frames(12), codec, **settings).read_bytes()
        for name, (codec, settings) in FILES.items()
    }
    outcomes = {"clips": 0, "reasons": 0}
    slowest, resident, descriptors = 0.0, [], []
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in range(first, first + count):
        name, content = mutated(originals, number)
        path = folder / (f"{number}-{name}" if number % 3 else f"{number}.tar")
        path.write_bytes(content if number % 3 else packed(number, name, content))
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        outcomes[read(path)] += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, time.perf_counter() - started)
        path.unlink()
        if (number - first) % 50 == 49:
            shards._scan.cache_clear()  # the cache of each shard
            gc.collect()
            resident.append(memory())
            descriptors.append(len(os.listdir("/proc/self/fd")))
    print(json.dumps({**outcomes, "slowest": slowest, "resident": resident, "descriptors": descriptors}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

"""Checksums of files, stored next to them: safetensors has none, and a flipped bit would change a weight."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from pvdm_fast.jobs.reading import UnreadableFile, file_clock, open_regular, read_json_object

NAME = "checksums.json"
MAX_BYTES = 1 << 20  # of it: a folder of ours has three files
SHOWN = 5


def _pieces(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        while piece := file.read(1 << 22):
            yield piece


def checksum(path: Path) -> int:
    """CRC-32 of a file, against accidents. Raises UnreadableFile if it isn't a file, or takes too long."""
    value = 0
    with file_clock(path):
        for piece in _pieces(path):
            value = zlib.crc32(piece, value)
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, to identify it. Raises UnreadableFile like `checksum`."""
    digest = hashlib.sha256()
    with file_clock(path):
        for piece in _pieces(path):
            digest.update(piece)
    return digest.hexdigest()


def write_checksums(folder: Path) -> None:
    """Write the CRC-32 of every file of a folder to its checksums.json."""
    sums = {item.name: checksum(item) for item in sorted(folder.iterdir()) if item.is_file() and item.name != NAME}
    (folder / NAME).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What differs from checksums.json, as the end of a sentence. None if nothing does, or there is no such file."""
    try:
        sums = read_json_object(folder / NAME, MAX_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, UnreadableFile):
        return f"its {NAME} can't be read"
    if not all(_is_plain_name(name) and type(value) is int for name, value in sums.items()):
        return f"its {NAME} names other things than the files of this folder"
    differing = []
    for name, value in sums.items():
        try:
            if checksum(folder / name) != value:
                differing.append(name)
        except FileNotFoundError:
            return f"{folder / name} is missing"
        except OSError as error:
            return f"{folder / name} can't be read: {error.strerror}"
        except UnreadableFile as reason:
            return f"{folder / name} {reason}"
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return f"{', '.join(differing[:SHOWN])}{more} is not as it was written (by {NAME})" if differing else None


def _is_plain_name(name: str) -> bool:
    """Whether a name stays inside its folder: no path, no way up."""
    return name not in ("", ".", "..", NAME) and "/" not in name and "\0" not in name

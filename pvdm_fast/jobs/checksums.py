"""Checksums of files; those of a folder's are kept beside them: safetensors has none, and a flipped bit would be
another weight."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

NAME = "checksums.json"


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            yield piece


def checksum(path: Path) -> int:
    """CRC-32 of a file: against accidents."""
    value = 0
    for piece in _pieces(path):
        value = zlib.crc32(piece, value)
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal: which file it is."""
    digest = hashlib.sha256()
    for piece in _pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def write_checksums(folder: Path) -> None:
    """Note the CRC-32 of every file of a folder in its checksums.json."""
    sums = {item.name: checksum(item) for item in sorted(folder.iterdir()) if item.is_file() and item.name != NAME}
    (folder / NAME).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What differs from checksums.json, as the end of a sentence; None where nothing does, or there is no such file."""
    try:
        sums = json.loads((folder / NAME).read_text(encoding="utf-8"))
        differing = [name for name, value in sums.items() if checksum(folder / name) != value]
    except FileNotFoundError as error:
        return None if error.filename == str(folder / NAME) else f"{error.filename} is missing"
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return f"its {NAME} can't be read"
    return f"{', '.join(differing)} is not as it was written (by {NAME})" if differing else None

"""Checksums of a folder's files, kept beside them: safetensors has none, and a flipped bit would be another weight."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

NAME = "checksums.json"


def checksum(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value


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

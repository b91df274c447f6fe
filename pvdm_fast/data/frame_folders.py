"""Videos stored as a folder of pictures, one per frame, through Pillow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pvdm_fast.data.errors import UnreadableVideo

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key by which ``frame2`` comes before ``frame10``."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def list_frames(folder: Path) -> list[Path]:
    """The pictures directly in a folder, in natural order of their names."""
    names = [name for name in _names(folder) if Path(name).suffix.lower() in IMAGE_SUFFIXES and name[0] != "."]
    return [folder / name for name in sorted(names, key=lambda name: (natural_key(name), name))]


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise UnreadableVideo(f"cannot be listed: {error.strerror or error}") from error


def read_picture(path: Path) -> np.ndarray:
    """One picture as writable uint8 (height, width, 3) RGB.

    Grey and palette pictures become RGB; 16-bit ones keep their upper 8 bits; transparent ones are laid over black.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.array(_as_rgb(picture))
    except UnreadableVideo:
        raise
    except Exception as error:  # whatever a damaged picture provokes, it is a reason to skip the video
        raise UnreadableVideo(f"{path.name} cannot be decoded: {error or type(error).__name__}") from error


def _as_rgb(picture: Image) -> Image:
    from PIL import Image

    if picture.mode.startswith("I"):  # 16-bit grey, in whatever container type this Pillow uses for it
        values = np.asarray(picture).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise UnreadableVideo("holds floating-point pictures, whose range is not defined")
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")

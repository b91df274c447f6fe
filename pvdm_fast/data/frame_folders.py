"""Videos stored as a folder of pictures, one per frame. Read with Pillow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pvdm_fast.data.errors import UnreadableVideo, unreadable
from pvdm_fast.jobs.reading import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 1 << 26  # 8192 x 8192; a header that claims more is taken to be damaged, instead of filling memory


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
        raise unreadable("cannot be listed", error) from error


def read_picture(path: Path) -> np.ndarray:
    """One picture as writable uint8 (height, width, 3) RGB, turned and mirrored as its EXIF orientation says.

    Grey and palette pictures become RGB. 16-bit pictures keep their upper 8 bits. Transparent ones are laid over black.
    The contents decide the format, not the name. Only the formats of IMAGE_SUFFIXES are tried, because for some others
    Pillow would start other programs.
    """
    from PIL import Image, ImageOps

    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UnreadableVideo(f"{path.name} has {picture.width} x {picture.height} pixels")
            return np.array(_as_rgb(ImageOps.exif_transpose(picture)))
    except UnreadableVideo:
        raise
    except Exception as error:  # a damaged picture can raise anything; the video is skipped
        raise unreadable(f"{path.name} cannot be decoded", error) from error


def over_black(rgba: np.ndarray) -> np.ndarray:
    """uint8 pixels (height, width, 4) with straight alpha, laid over black: (height, width, 3)."""
    product = rgba[..., :3] * rgba[..., 3:].astype(np.uint16)
    return ((product + 127) // 255).astype(np.uint8)


def _as_rgb(picture: Image) -> np.ndarray:
    if picture.mode.startswith("I"):  # 16-bit grey, in whichever mode this Pillow uses for it
        values = np.asarray(picture).astype(np.int64)
        return np.repeat((values.clip(0, 65535) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if picture.mode == "F":
        raise UnreadableVideo("holds floating-point pictures, whose range is not defined")
    if picture.has_transparency_data:
        return over_black(np.asarray(picture.convert("RGBA")))
    return np.asarray(picture.convert("RGB"))

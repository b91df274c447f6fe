"""How a shard of latents is stored: one safetensors file, or a webdataset shard with one sample per clip.

Next to the latents, float32 (n, windows, D, N), a shard holds one JSON object about all of them.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pvdm_fast.data.shards import Sample, library, read_sample, scan
from pvdm_fast.jobs.files import share_as_usual
from pvdm_fast.jobs.reading import open_regular, parse_json

CONTAINERS = ("safetensors", "tar")
_ABOUT = "__about__"  # the library leaves members with such names out of samples


class LatentShard(ABC):
    """An open shard: ``about``, the shape of its latents, and its clips by number."""

    about: dict[str, Any]
    shape: tuple[int, ...]

    @abstractmethod
    def clip(self, row: int) -> torch.Tensor:
        """The latents (windows, D, N) of one clip."""


class SafetensorsShard(LatentShard):
    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        with open_regular(path):
            pass
        self._file = safe_open(path, "pt")
        self.about = _about(self._file.metadata()["about"])
        self.shape = tuple(self._file.get_slice("latents").get_shape())

    def clip(self, row: int) -> torch.Tensor:
        latents: torch.Tensor = self._file.get_slice("latents")[row]
        return latents


class TarShard(LatentShard):
    def __init__(self, path: Path) -> None:
        places = scan(path)  # scan refuses sizes beyond the end of the file
        with open_regular(path) as shard, tarfile.open(fileobj=shard, mode="r:") as archive:
            first = archive.next()
            file = archive.extractfile(first) if first is not None and first.name == _ABOUT else None
            if file is None:
                raise ValueError("it doesn't begin with what it holds")
            self.about = _about(file.read())
        self._samples = [Sample(path, key, False, begin, end) for key, begin, end, _ in places]
        self.shape = (len(self._samples), *self.clip(0).shape)

    def clip(self, row: int) -> torch.Tensor:
        return torch.from_numpy(_array(read_sample(self._samples[row])["npy"]).astype(np.float32, copy=False))


def _array(content: bytes) -> np.ndarray:
    """The array of a .npy file. Its header must fit its bytes: np.load would allocate whatever the header claims."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its .npy is not of version 1.0")
    shape, fortran, kind = np.lib.format.read_array_header_1_0(file)
    rest = content[file.tell() :]
    if kind.hasobject or math.prod(shape) * kind.itemsize != len(rest):
        raise ValueError(f"its .npy says {shape} of {kind}, but has {len(rest)} bytes")
    return np.frombuffer(rest, kind).reshape(shape, order="F" if fortran else "C").copy()


def _about(text: str | bytes) -> dict[str, Any]:
    about = parse_json(text)
    if not isinstance(about, dict):
        raise ValueError("it doesn't say what it holds")
    return about


def open_shard(path: Path) -> LatentShard:
    """Opens a shard by its suffix. A missing or damaged one raises errors of many types."""
    return TarShard(path) if path.suffix == ".tar" else SafetensorsShard(path)


def save_shard(path: Path, container: str, first: int, latents: torch.Tensor, about: dict[str, Any]) -> None:
    """Write latents of the draws from ``first`` on. The same latents give the same bytes. Raises OSError."""
    if container == "safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            # a single entry of metadata, because safetensors writes several in any order
            save_file({"latents": latents.contiguous()}, path, {"about": json.dumps(about)})
            share_as_usual(path)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        return
    with open(path, "wb") as file, library().TarWriter(file, mtime=0) as writer:
        content = json.dumps(about).encode()
        member = tarfile.TarInfo(_ABOUT)
        member.size = len(content)
        writer.tarstream.addfile(member, io.BytesIO(content))
        for row, (name, label) in enumerate(zip(about["names"], about["labels"], strict=True)):
            described = {"name": name, "label": label}
            writer.write({"__key__": f"{first + row:09d}", "npy": latents[row].numpy(), "json": described})

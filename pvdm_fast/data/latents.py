"""Latents made once and read by the diffusion stage: shards, and an index that says what they are.

A folder of latents holds ``settings.json`` (what is encoded, and how: written first), ``train-00000.safetensors``,
``test-00000.safetensors`` and so on (or ``.tar``), and ``index.json``, which is written when every shard is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pvdm_fast.data.clips import ClipDataset, ClipSpec, Item, Skipped
from pvdm_fast.data.draws import epoch_order
from pvdm_fast.data.errors import DataError
from pvdm_fast.data.latent_shards import LatentShard, open_shard
from pvdm_fast.data.watch import reading

if TYPE_CHECKING:
    from pvdm_fast.models import Autoencoder

FORMAT = "pvdm_fast latents 1"
SETTINGS, INDEX = "settings.json", "index.json"
SPLITS = ("train", "test")
MOMENTS = ("sum", "squares", "minimum", "maximum")
OPEN_SHARDS = 64


@dataclass(frozen=True)
class Settings:
    """What a folder of latents holds; every process that writes to it must have the same.

    ``autoencoder`` is its :func:`fingerprint`. A clip has ``frames`` = 2T frames, and latents at ``windows`` windows of
    T; ``train_clips`` and ``test_clips`` are the draws 0, 1, ... of ``data``, ``shard_clips`` of them in a shard.
    ``container`` is the shards' suffix, "safetensors" or "tar".
    """

    autoencoder: str
    data: str
    description: str
    frames: int
    height: int
    width: int
    stride: int
    seed: int
    flip: bool
    windows: int
    channels: int
    tokens: int
    train_clips: int
    test_clips: int
    shard_clips: int
    container: str
    format: str = FORMAT

    def shards(self) -> Iterator[Shard]:
        for split in SPLITS:
            clips = getattr(self, f"{split}_clips")
            for number, first in enumerate(range(0, clips, self.shard_clips)):
                name = f"{split}-{number:05d}.{self.container}"
                yield Shard(split, name, range(first, min(clips, first + self.shard_clips)))

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One file of latents: which draws of which split."""

    split: str
    name: str
    draws: range


def fingerprint(autoencoder: Autoencoder) -> str:
    """SHA-256 of an autoencoder's sizes and weights, whatever file they came from."""
    sizes = {name: value for name, value in autoencoder.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode())
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def shard_problem(path: Path, shard: Shard, settings: Settings) -> str | None:
    """Why a file is not this shard, whole; None where it is."""
    try:
        found = open_shard(path)
    except FileNotFoundError:
        return "it is missing"
    except Exception as error:  # whatever a damaged file provokes
        return f"it cannot be read ({error})"
    if found.about.get("settings") != settings.hash():
        return "it was written with other settings"
    expected = (len(shard.draws), settings.windows, settings.channels, settings.tokens)
    return None if found.shape == expected else f"it holds {found.shape} instead of {expected}"


def read_index(root: Path) -> Settings:
    """The settings of a complete folder of latents; raises :class:`DataError` where it is none."""
    try:
        index = json.loads((root / INDEX).read_text(encoding="utf-8"))
        if index["settings"]["format"] != FORMAT:
            raise DataError(f"{root / INDEX} is of the format {index['settings']['format']!r}, not {FORMAT!r}")
        return Settings(**index["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {root / INDEX}: {error}; make the latents with pvdm_fast.encode") from error


def read_labels(root: Path) -> list[str]:
    """The classes in a folder of latents, in the order of their numbers; raises DataError where it has no index."""
    read_index(root)
    labels: list[str] = json.loads((root / INDEX).read_text(encoding="utf-8"))["labels"]
    return labels


def is_latents(root: Path) -> bool:
    """Whether a folder was written by ``python -m pvdm_fast.encode``; raises DataError where it isn't finished."""
    if not (root / SETTINGS).is_file():
        return False
    if not (root / INDEX).is_file():
        raise DataError(f"the latents in {root} are not complete: run the same pvdm_fast.encode command again")
    return True


class LatentClips(ClipDataset):
    """Cached latents by draw number; an item's ``video`` is float32 (windows, D, N).

    The first ``len`` draws are those draws of the videos that were encoded; after them come other orders of the same.
    """

    def __init__(self, root: Path, spec: ClipSpec) -> None:
        self.root, self.spec = root, spec
        self.settings = settings = read_index(root)
        self._hash = settings.hash()
        for name in ("frames", "height", "width", "stride", "flip"):
            have, want = getattr(settings, name), getattr(spec, name)
            if have != want:
                raise DataError(
                    f"the latents in {root} are of clips with {name} {have}, but {name} {want} is asked for"
                )
        self.shards = [shard for shard in settings.shards() if shard.split == spec.split]
        self.description = (
            f"cached latents of {settings.data}: {len(self)} clips of {settings.frames} frames in the {spec.split} "
            f"split, {settings.windows} windows each, by the autoencoder {settings.autoencoder[:12]}"
        )
        if len(self) == 0:
            raise DataError(f"the latents in {root} hold no clips of the {spec.split} split")

    def __len__(self) -> int:
        return int(getattr(self.settings, f"{self.spec.split}_clips"))

    def __getitem__(self, draw: int) -> Item:
        if draw < 0:
            raise IndexError(f"draw numbers begin at 0, got {draw}")
        epoch, place = divmod(draw, len(self))
        if epoch:
            place = int(epoch_order(len(self), self.spec.seed, epoch)[place])
        number, row = divmod(place, self.settings.shard_clips)
        shard = self.shards[number]
        path = self.root / shard.name
        try:
            with reading(str(path), self.spec.read_timeout):
                opened = _opened(path, self._hash)
                latents = opened.clip(row)
        except Exception as error:  # whatever a damaged file provokes
            problem = shard_problem(path, shard, self.settings) or error
            raise DataError(f"the shard {path} cannot be used: {problem}; delete it and encode again") from error
        about = opened.about
        return {"video": latents, "name": about["names"][row], "label": about["labels"][row], "skipped": []}


@lru_cache(OPEN_SHARDS)
def _opened(path: Path, settings: str) -> LatentShard:
    """A shard; one of other settings is refused."""
    shard = open_shard(path)
    if shard.about["settings"] != settings:
        raise DataError("it was written with other settings")
    return shard


def describe_shard(
    settings: Settings, latents: torch.Tensor, names: list[str], labels: list[str | None], skipped: Skipped
) -> dict[str, Any]:
    """What a shard says of its latents (n, windows, D, N): per channel, too, what the statistics are made of."""
    values = latents.double().transpose(0, 2).flatten(1)  # (D, n * windows * N)
    moments = (values.sum(1), values.square().sum(1), values.amin(1), values.amax(1))
    return {
        "settings": settings.hash(),
        "names": names,
        "labels": labels,
        "skipped": skipped,
        "moments": {name: moment.tolist() for name, moment in zip(MOMENTS, moments, strict=True)},
    }


def make_index(root: Path, settings: Settings) -> dict[str, Any]:
    """The index of a complete folder: settings, shards, labels, and each channel's statistics over both splits."""
    abouts = [open_shard(root / shard.name).about for shard in settings.shards()]
    labels = {label for about in abouts for label in about["labels"] if label is not None}
    count = (settings.train_clips + settings.test_clips) * settings.windows * settings.tokens
    stacked = {
        name: torch.tensor([about["moments"][name] for about in abouts], dtype=torch.float64) for name in MOMENTS
    }
    mean = stacked["sum"].sum(0) / count
    deviation = (stacked["squares"].sum(0) / count - mean.square()).clamp(min=0).sqrt()
    statistics = {
        "mean": mean,
        "standard_deviation": deviation,
        "minimum": stacked["minimum"].amin(0),
        "maximum": stacked["maximum"].amax(0),
    }
    return {
        "settings": asdict(settings),
        "shards": [{"file": shard.name, "clips": len(shard.draws)} for shard in settings.shards()],
        "labels": sorted(labels, key=lambda label: (label.casefold(), label)),
        "statistics": {
            name: [float(f"{value:.6g}") for value in values.tolist()] for name, values in statistics.items()
        },
        "unreadable_files": dict(entry for about in abouts for entry in about["skipped"]),
    }

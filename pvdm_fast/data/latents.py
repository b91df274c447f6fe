"""Cached latents for the diffusion stage: shards, and an index that says what they are.

A folder of latents holds ``settings.json`` (what is encoded, and how), which is written first. Then come
``train-00000.safetensors``, ``test-00000.safetensors`` and so on (or ``.tar``). ``index.json`` is written last, when
every shard is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pvdm_fast.data.clips import ClipDataset, ClipSpec, Item, Skipped
from pvdm_fast.data.draws import epoch_order
from pvdm_fast.data.errors import DataError
from pvdm_fast.data.latent_shards import CONTAINERS, LatentShard, open_shard
from pvdm_fast.data.layouts import FIRST_FOLD
from pvdm_fast.data.watch import reading
from pvdm_fast.jobs.reading import UnreadableFile, read_json, read_json_object

if TYPE_CHECKING:
    from pvdm_fast.models import Autoencoder

FORMAT = "pvdm_fast latents 1"
SETTINGS, INDEX = "settings.json", "index.json"
SPLITS = ("train", "test")
MOMENTS = ("sum", "squares", "minimum", "maximum")
OPEN_SHARDS = 64
SETTINGS_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What a folder of latents holds. Every process that writes to it must have the same settings.

    ``autoencoder`` is its `fingerprint`. A clip has ``frames`` = 2T frames, and latents at ``windows`` windows of
    T; ``train_clips`` and ``test_clips`` are the draws 0, 1, ... of ``data``, ``shard_clips`` of them in a shard.
    ``container`` is the shards' suffix, "safetensors" or "tar"; ``dtype`` what the autoencoder computed in, "float32"
    or "bf16". ``crop``, ``resize`` and ``fold`` are those of `ClipSpec`.
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
    dtype: str = "float32"
    crop: str = "random"
    resize: str = "bicubic"
    fold: int = FIRST_FOLD
    format: str = FORMAT

    def check(self) -> None:
        """Raises ValueError for values that no folder of latents can have."""
        for name, kind in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if type(value).__name__ != kind.type:
                raise ValueError(f"its {name} is {value!r:.50}, not of the type {kind.type}")
            if kind.type == "int" and ((value < 1 and name not in ("seed", "train_clips", "test_clips")) or value < 0):
                raise ValueError(f"its {name} is {value}")
        if self.container not in CONTAINERS:
            raise ValueError(f"its container is {self.container!r:.50}")

    def shard_count(self, split: str) -> int:
        return -(-int(getattr(self, f"{split}_clips")) // self.shard_clips)

    def shards(self) -> Iterator[Shard]:
        for split in SPLITS:
            clips = getattr(self, f"{split}_clips")
            for number, first in enumerate(range(0, clips, self.shard_clips)):
                name = f"{split}-{number:05d}.{self.container}"
                yield Shard(split, name, range(first, min(clips, first + self.shard_clips)))

    def hash(self) -> str:
        values = asdict(self)
        for name, default in LATER.items():
            if values[name] == default:
                del values[name]  # shards that were written before there was another one stay good
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# What settings hold that were written before there was a choice.
LATER = {item.name: item.default for item in fields(Settings) if item.default is not MISSING and item.name != "format"}


@dataclass(frozen=True)
class Shard:
    """One file of latents: which draws of which split."""

    split: str
    name: str
    draws: range


def fingerprint(autoencoder: Autoencoder) -> str:
    """SHA-256 of an autoencoder's sizes and weights, whichever file they came from."""
    sizes = {name: value for name, value in autoencoder.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode())
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def shard_problem(path: Path, shard: Shard, settings: Settings) -> str | None:
    """Why a file isn't this shard, complete. None if it is."""
    try:
        found = open_shard(path)
    except FileNotFoundError:
        return "it is missing"
    except Exception as error:  # a damaged file can raise anything
        return f"it cannot be read ({error})"
    if found.about.get("settings") != settings.hash():
        return "it was written with other settings"
    count = len(shard.draws)
    if any(len(found.about.get(name, ())) != count for name in ("names", "labels")):
        return "it doesn't name its clips"
    expected = (count, settings.windows, settings.channels, settings.tokens)
    return None if found.shape == expected else f"it holds {found.shape} instead of {expected}"


def read_index(root: Path) -> Settings:
    """The settings of a complete folder of latents. Raises `DataError` if it isn't one."""
    return _read_index(root)[0]


def _read_index(root: Path) -> tuple[Settings, list[str]]:
    """Settings and labels. They are compared with the files on the disk before anything relies on them."""
    place = root / INDEX
    try:
        index = read_json_object(place)
        settings = index["settings"]
        if settings["format"] != FORMAT:
            raise DataError(f"{place} is of the format {settings['format']!r:.100}, not {FORMAT!r}")
        found, labels = Settings(**settings), index["labels"]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError("its labels are no names")
        found.check()
        shards = sum(found.shard_count(split) for split in SPLITS)
        there = sum(item.suffix == f".{found.container}" for item in root.iterdir())
        if shards > there:
            raise ValueError(f"it lists {shards} shards, but {there} are there")
        return found, labels
    except OSError as error:
        raise DataError(f"cannot read {place}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {place}: {error!s:.200}; make the latents with pvdm_fast.encode") from error


def read_labels(root: Path) -> list[str]:
    """The classes in a folder of latents, in the order of their numbers. Raises DataError if there is no index."""
    return _read_index(root)[1]


def is_latents(root: Path) -> bool:
    """Whether ``python -m pvdm_fast.encode`` wrote this folder. Raises DataError if it isn't finished.

    A settings.json of something else, perhaps next to videos, doesn't count.
    """
    try:
        settings = read_json(root / SETTINGS, SETTINGS_BYTES)
        ours = isinstance(settings, dict) and str(settings.get("format")).startswith(FORMAT.rpartition(" ")[0])
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    except (OSError, UnreadableFile):
        ours = (root / INDEX).is_file()
    if not ours:
        return False
    if not (root / INDEX).is_file():
        raise DataError(f"the latents in {root} are not complete: run the same pvdm_fast.encode command again")
    return True


class LatentClips(ClipDataset):
    """Cached latents by draw number. An item's ``video`` is float32 (windows, D, N).

    The first ``len`` draws are the encoded draws of the videos. Later draws repeat them in other orders.
    """

    def __init__(self, root: Path, spec: ClipSpec) -> None:
        self.root, self.spec = root, spec
        self.settings = settings = read_index(root)
        self._hash = settings.hash()
        if spec.pad_short:
            raise DataError(f"the latents in {root} are of whole clips: leave out --pad-short (or say --no-pad-short)")
        for name in ("frames", "height", "width", "stride", "flip", "crop", "resize", "fold"):
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
                name, label = opened.about["names"][row], opened.about["labels"][row]
        except Exception as error:  # a damaged file can raise anything
            problem = shard_problem(path, shard, self.settings) or error
            raise DataError(f"the shard {path} cannot be used: {problem}; delete it and encode again") from error
        return {"video": latents, "name": name, "label": label, "skipped": []}


@lru_cache(OPEN_SHARDS)
def _opened(path: Path, settings: str) -> LatentShard:
    """Opens a shard, and refuses one with other settings."""
    shard = open_shard(path)
    if shard.about["settings"] != settings:
        raise DataError("it was written with other settings")
    return shard


def describe_shard(
    settings: Settings, latents: torch.Tensor, names: list[str], labels: list[str | None], skipped: Skipped
) -> dict[str, Any]:
    """What a shard says about its latents (n, windows, D, N), with the sums per channel that the statistics need."""
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
    """The index of a complete folder: settings, shards, labels, and statistics per channel over both splits."""
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

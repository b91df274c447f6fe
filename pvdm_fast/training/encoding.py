"""Encodes clips once, so that the diffusion stage reads their latents: for `pvdm_fast.encode` and for a run of its own.

Stopped or killed, the same call goes on. Several processes each write their share of the shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pvdm_fast.data import ClipDataset, ClipLoader, open_dataset
from pvdm_fast.data.clips import SYNTHETIC
from pvdm_fast.data.latent_shards import save_shard
from pvdm_fast.data.latents import (
    INDEX,
    LATER,
    SETTINGS,
    SPLITS,
    LatentClips,
    Settings,
    Shard,
    describe_shard,
    fingerprint,
    make_index,
    shard_problem,
)
from pvdm_fast.data.shapes import RECIPE
from pvdm_fast.data.transforms import to_float
from pvdm_fast.diffusion.noise import window_starts
from pvdm_fast.errors import Interrupted, UserError, printable
from pvdm_fast.jobs import threads
from pvdm_fast.jobs.files import TEMPORARY, flush
from pvdm_fast.jobs.interrupt import StopRequest
from pvdm_fast.jobs.progress import make_bar
from pvdm_fast.jobs.reading import READ_TIMEOUT, read_json_object
from pvdm_fast.models import Autoencoder
from pvdm_fast.training.config import TrainConfig
from pvdm_fast.training.stages import DiffusionStage, video_size

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What is encoded, and how.

    Args:
        data: videos, as for --data of training. out: the folder for the latents.
        clips: training clips of 2T frames, the first draws of ``data``. None: an epoch, one of each video.
        test_clips: held-out clips, at most an epoch.
        windows: how many windows of T frames of each clip's 2T, spread evenly, 2 to T + 1.
        stride, seed, flip, crop, resize, fold, read_timeout, workers: as for training.
        batch_size: clips encoded at once.
        shard_clips: clips per file. container: "safetensors" or "tar".
    """

    data: str
    out: Path
    clips: int | None = None
    test_clips: int = 256
    windows: int = 2
    stride: int = 1
    seed: int = 0
    flip: bool = False
    batch_size: int = 8
    shard_clips: int = 512
    container: str = "safetensors"
    workers: int = 2
    read_timeout: float = READ_TIMEOUT
    crop: Literal["random", "centre"] = "random"
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    fold: int = 1


def encode(wanted: Encoding, autoencoder: Autoencoder, precision: str, rank: int = 0, world: int = 1) -> None:
    """Encode this process's share of the shards on the autoencoder's device, and write the index if all are there.

    Args:
        precision: "float32", or "bf16" under autocast.

    Raises:
        UserError: the data or the folder doesn't fit.
    """
    datasets = {split: open_split(wanted, autoencoder, split) for split in ("train", "test")}
    settings = make_settings(wanted, autoencoder, datasets, fingerprint(autoencoder), precision)
    claim(wanted.out, settings)
    shards = [
        shard
        for number, shard in enumerate(settings.shards())
        if number % world == rank and shard_problem(wanted.out / shard.name, shard, settings)
    ]
    left_out = f"; left out: {datasets['train'].left_out}" if datasets["train"].left_out else ""
    print(
        printable(f"{datasets['train'].description}{left_out}; {len(shards)} shards to encode on {autoencoder.device}"),
        flush=True,
    )
    autoencoder.eval().requires_grad_(False)
    for split, dataset in datasets.items():
        mine = [shard for shard in shards if shard.split == split]
        if mine:
            encode_shards(wanted, mine, dataset, autoencoder, settings)
    finish(wanted.out, settings)


def open_split(wanted: Encoding, autoencoder: Autoencoder, split: str) -> ClipDataset:
    """The clips of 2T frames of a split."""
    frames, height, width = video_size(autoencoder)
    dataset = open_dataset(
        wanted.data,
        frames=2 * frames,
        height=height,
        width=width,
        stride=wanted.stride,
        split=split,
        seed=wanted.seed,
        flip=wanted.flip,
        read_timeout=wanted.read_timeout,
        crop=wanted.crop,
        resize=wanted.resize,
        fold=wanted.fold,
    )
    if isinstance(dataset, LatentClips):
        raise UserError(f"{wanted.data} holds latents already: name the videos that they were made from")
    return dataset


def make_settings(
    wanted: Encoding,
    autoencoder: Autoencoder,
    datasets: dict[str, ClipDataset],
    fingerprint: str,
    dtype: str,
) -> Settings:
    spec = datasets["train"].spec
    return Settings(
        autoencoder=fingerprint,
        data=wanted.data,
        description=datasets["train"].description,
        frames=spec.frames,
        height=spec.height,
        width=spec.width,
        stride=spec.stride,
        seed=spec.seed,
        flip=spec.flip,
        windows=wanted.windows,
        channels=int(autoencoder.config["latent_channels"]),
        tokens=autoencoder.layout.num_tokens,
        train_clips=wanted.clips or len(datasets["train"]),
        test_clips=min(wanted.test_clips, len(datasets["test"])),
        shard_clips=wanted.shard_clips,
        container=wanted.container,
        dtype=dtype,
        crop=spec.crop,
        resize=spec.resize,
        fold=spec.fold,
    )


@contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """A name next to ``path`` that no other process uses. Whatever is left there at the end is removed."""
    temporary = path.with_name(f"{TEMPORARY}{os.uname().nodename}-{os.getpid()}-{path.name}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def claim(out: Path, settings: Settings) -> None:
    """Write the settings of a new folder. Raises UserError if it holds anything made with other settings."""
    path = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(item.name[0] != "." for item in out.iterdir()) and not path.exists():
                raise UserError(f"{out} is not empty and holds no latents: name another folder")
            with temporary_name(path) as temporary, suppress(FileExistsError):
                temporary.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
                flush(temporary)
                os.link(temporary, path)  # fails if another process was first
        there = read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use the folder {out}: {getattr(error, 'strerror', None) or error}") from error
    for name, asked in asdict(settings).items():
        have = there.get(name, LATER.get(name))
        if have != asked:
            raise UserError(
                f"{out} holds latents made with {name} {have}, but {asked} is asked for: name another folder"
            )


def encode_shards(
    wanted: Encoding,
    shards: list[Shard],
    dataset: ClipDataset,
    autoencoder: Autoencoder,
    settings: Settings,
) -> None:
    """Encode shards one after another. The loader reads ahead across their borders."""
    size = wanted.batch_size
    counts = [-(-len(shard.draws) // size) for shard in shards]
    draws = [list(shard.draws[at : at + size]) for shard in shards for at in range(0, len(shard.draws), size)]
    loader = ClipLoader(
        dataset, draws, workers=wanted.workers, pin_memory=autoencoder.device.type == "cuda", pixels=True
    )
    batches = iter(loader)
    with make_bar(f"{dataset.spec.split} clips", sum(map(len, draws)), unit="clip") as bar:
        for shard, count in zip(shards, counts, strict=True):
            parts, names, labels, skipped = [], [], [], []
            for _ in range(count):
                batch = next(batches)
                with threads.unit("batch of clips"):
                    parts.append(encode_windows(batch["video"], autoencoder, settings))
                names += batch["names"]
                labels += batch["labels"]
                skipped += batch["skipped"]
                bar.update(len(batch["names"]))
            latents = torch.cat(parts)
            about = describe_shard(settings, latents, names, labels, skipped)
            write_shard(wanted.out, shard, settings, latents, about)


def encode_windows(pixels: torch.Tensor, autoencoder: Autoencoder, settings: Settings) -> torch.Tensor:
    """Latents float32 (B, windows, D, N) on the CPU of clips uint8 (B, 3, 2T, H, W)."""
    half, device = pixels.shape[2] // 2, autoencoder.device
    video = to_float(pixels.to(device, non_blocking=True))
    starts = window_starts(half, settings.windows)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
        latents = [autoencoder.encode(video[:, :, start : start + half]).latent.float() for start in starts]
    return torch.stack(latents, 1).cpu()


def write_shard(out: Path, shard: Shard, settings: Settings, latents: torch.Tensor, about: dict[str, Any]) -> None:
    """Write one shard, complete or not at all. Raises UserError if it can't be written or isn't finite."""
    if not latents.isfinite().all():
        raise UserError(f"the autoencoder's latents of {shard.name} are not finite: it cannot be used")
    try:
        with temporary_name(out / shard.name) as temporary:
            save_shard(temporary, settings.container, shard.draws[0], latents, about)
            flush(temporary)
            os.replace(temporary, out / shard.name)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write the shard {out / shard.name}: {reason}; the shards before it are kept"
        ) from error


def finish(out: Path, settings: Settings) -> None:
    """Write the index if every shard is there. The last process to arrive does it."""
    missing = [shard.name for shard in settings.shards() if shard_problem(out / shard.name, shard, settings)]
    if missing:
        print(f"this process is done; {len(missing)} shards are still to be written by others, first {missing[0]}")
        return
    index = make_index(out, settings)
    try:
        with temporary_name(out / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            flush(temporary)
            os.replace(temporary, out / INDEX)
        for split in SPLITS:
            for left in out.glob(f"{TEMPORARY}*-{split}-*"):  # leftovers of killed processes
                left.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out / INDEX}: {error.strerror or error}") from error
    skipped = len(index["unreadable_files"])
    note = f"; {skipped} files could not be read, see {INDEX}" if skipped else ""
    print(f"{settings.train_clips} training and {settings.test_clips} test clips in {out}{note}")


def cached_latents(
    stage: DiffusionStage, config: TrainConfig, folder: Path, accelerator: Accelerator, stop: StopRequest
) -> str:
    """The folder below ``folder`` with the latents of --diffusion-cached-clips, made if it isn't there yet.

    All processes make their shares of it. Other data or another autoencoder have another folder.

    Raises:
        Interrupted: a signal came. What is written is whole.
    """
    stage.to(accelerator.device)
    wanted = Encoding(
        data=config.data,
        out=folder,
        clips=config.diffusion.cached_clips,
        test_clips=config.held_out_clips,
        seed=config.seed,
        workers=config.video.workers,
        **config.video.drawing(),
    )
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "float32"  # fp16 is for GPUs that lack bf16
    drawn = replace(wanted, workers=0, read_timeout=0.0)  # which change no clip
    facts = f"{drawn} {precision} {fingerprint(stage.autoencoder)}"
    if config.data == SYNTHETIC:
        facts += f" recipe {RECIPE}"
    place = folder / hashlib.sha256(facts.encode()).hexdigest()[:12]
    share = stop.processes.share
    try:
        with stop.waiting():
            encode(replace(wanted, out=place), stage.autoencoder, precision, share.rank, share.world)
    except Interrupted:
        pass  # what all agree on counts
    stop.check()
    return str(place)

"""``python -m pvdm_fast.encode``: the latents of clips, made once, for the diffusion stage to read."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvdm_fast.errors import UserError, printable
from pvdm_fast.jobs.command import run_command

if TYPE_CHECKING:
    import torch

    from pvdm_fast.data import ClipDataset
    from pvdm_fast.data.latents import Settings, Shard
    from pvdm_fast.models import Autoencoder


def make_parser() -> argparse.ArgumentParser:
    from pvdm_fast.jobs import devices, numbers
    from pvdm_fast.jobs.arguments import Parser
    from pvdm_fast.jobs.reading import READ_TIMEOUT

    parser = Parser(
        prog="python -m pvdm_fast.encode",
        description="Encodes clips of 2T frames with a trained autoencoder, so that --stage diffusion need not: "
        "python -m pvdm_fast.train --stage diffusion --autoencoder-from RUN --data OUT. The clips are the first draws "
        "that training with the same seed, stride and flip would take from DATA. Stopped or killed, the same command "
        "goes on. Started by torchrun or accelerate launch (or with RANK and WORLD_SIZE set), each process writes its "
        "share of the shards.",
    )

    def number(kind: numbers.Number) -> dict[str, Any]:
        return {"type": kind, "metavar": "N"}

    default = "(default: %(default)s)"
    parser.add_argument("data", metavar="DATA", help="what --data of training takes")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the latents")
    parser.add_argument("--autoencoder", type=Path, required=True, metavar="RUN", help="its run, or its folder")
    parser.add_argument(
        "--clips", **number(numbers.VIDEOS), help="clips to encode (default: an epoch, one of each video)"
    )
    parser.add_argument(
        "--test-clips", default=256, **number(numbers.VIDEOS), help=f"held-out clips, at most an epoch {default}"
    )
    parser.add_argument(
        "--windows",
        default=2,
        **number(numbers.CLIP_FRAMES),
        help="windows of T frames encoded of each clip's 2T, evenly from the first to the last; T + 1 are all that "
        f"training draws from {default}",
    )
    parser.add_argument(
        "--stride", default=1, **number(numbers.STRIDE), help=f"take every n-th frame of a video {default}"
    )
    parser.add_argument("--seed", default=0, **number(numbers.SEED), help=f"seed of the clips {default}")
    parser.add_argument("--flip", action="store_true", help="mirror half of the training clips")
    parser.add_argument("--batch-size", default=8, **number(numbers.BATCH), help=f"clips encoded at once {default}")
    parser.add_argument("--shard-clips", default=512, **number(numbers.VIDEOS), help=f"clips in a file {default}")
    parser.add_argument(
        "--container",
        default="safetensors",
        metavar="{safetensors,tar}",
        help=f"tar writes webdataset shards, a sample for each clip {default}",
    )
    parser.add_argument(
        "--workers", default=2, **number(numbers.WORKERS), help=f"processes that read clips ahead {default}"
    )
    parser.add_argument(
        "--read-timeout",
        default=READ_TIMEOUT,
        type=numbers.SECONDS,
        metavar="X",
        help=f"seconds after which a file that cannot be read is left out {default}",
    )
    parser.add_argument("--device", default="auto", type=devices.DEVICE, metavar=devices.METAVAR, help=devices.HELP)
    return parser


def encode(arguments: argparse.Namespace) -> None:
    """Encode this process's share of the shards, and write the index if all are there.

    Raises:
        UserError: an option, the autoencoder, the data or the folder doesn't fit.
    """
    import torch

    from pvdm_fast.data.latents import fingerprint, shard_problem
    from pvdm_fast.jobs.devices import claim_device
    from pvdm_fast.training.initialisation import find_autoencoder

    rank, world = check(arguments)
    autoencoder = find_autoencoder(arguments.autoencoder, "--autoencoder")
    frames = int(autoencoder.config["frames"])
    if not 2 <= arguments.windows <= frames + 1:
        raise UserError(
            f"--windows must be from 2 to {frames + 1} (T + 1) for this autoencoder, not {arguments.windows}"
        )
    datasets = {split: open_split(arguments, autoencoder, split) for split in ("train", "test")}
    settings = make_settings(arguments, autoencoder, datasets, fingerprint(autoencoder))
    claim(arguments.out, settings)
    shards = [
        shard
        for number, shard in enumerate(settings.shards())
        if number % world == rank and shard_problem(arguments.out / shard.name, shard, settings)
    ]
    device = claim_device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    left_out = f"; left out: {datasets['train'].left_out}" if datasets["train"].left_out else ""
    print(
        printable(f"{datasets['train'].description}{left_out}; {len(shards)} shards to encode on {device}"), flush=True
    )
    autoencoder.eval().requires_grad_(False).to(device)
    for split, dataset in datasets.items():
        mine = [shard for shard in shards if shard.split == split]
        if mine:
            encode_shards(arguments, mine, dataset, autoencoder, settings)
    finish(arguments.out, settings)


def check(arguments: argparse.Namespace) -> tuple[int, int]:
    """This process's number and how many there are; raises UserError for an option that cannot be."""
    from pvdm_fast.data.latent_shards import CONTAINERS
    from pvdm_fast.data.shards import library
    from pvdm_fast.jobs.environment import place_in_job

    if arguments.container not in CONTAINERS:
        raise UserError(f"--container must be one of {', '.join(CONTAINERS)}, not {arguments.container}")
    if arguments.container == "tar":
        library()
    place = place_in_job(meeting=False)
    return place.rank, place.world


def open_split(arguments: argparse.Namespace, autoencoder: Autoencoder, split: str) -> ClipDataset:
    """The clips of 2T frames of a split."""
    from pvdm_fast.data import open_dataset
    from pvdm_fast.data.latents import LatentClips
    from pvdm_fast.training.stages import video_size

    frames, height, width = video_size(autoencoder)
    dataset = open_dataset(
        arguments.data,
        frames=2 * frames,
        height=height,
        width=width,
        stride=arguments.stride,
        split=split,
        seed=arguments.seed,
        flip=arguments.flip,
        read_timeout=arguments.read_timeout,
    )
    if isinstance(dataset, LatentClips):
        raise UserError(f"{arguments.data} holds latents already: name the videos that they were made from")
    return dataset


def make_settings(
    arguments: argparse.Namespace, autoencoder: Autoencoder, datasets: dict[str, ClipDataset], fingerprint: str
) -> Settings:
    from pvdm_fast.data.latents import Settings

    spec = datasets["train"].spec
    return Settings(
        autoencoder=fingerprint,
        data=arguments.data,
        description=datasets["train"].description,
        frames=spec.frames,
        height=spec.height,
        width=spec.width,
        stride=spec.stride,
        seed=spec.seed,
        flip=spec.flip,
        windows=arguments.windows,
        channels=int(autoencoder.config["latent_channels"]),
        tokens=autoencoder.layout.num_tokens,
        train_clips=arguments.clips or len(datasets["train"]),
        test_clips=min(arguments.test_clips, len(datasets["test"])),
        shard_clips=arguments.shard_clips,
        container=arguments.container,
    )


@contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """A name beside ``path`` that no other process uses; nothing is left there."""
    from pvdm_fast.jobs.files import TEMPORARY

    temporary = path.with_name(f"{TEMPORARY}{os.uname().nodename}-{os.getpid()}-{path.name}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def claim(out: Path, settings: Settings) -> None:
    """Write the settings of a new folder; raises UserError where it holds anything made with others."""
    from pvdm_fast.data.latents import SETTINGS
    from pvdm_fast.jobs.files import flush
    from pvdm_fast.jobs.reading import read_json_object

    path = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(item.name[0] != "." for item in out.iterdir()) and not path.exists():
                raise UserError(f"{out} is not empty and holds no latents: name another folder")
            with temporary_name(path) as temporary, suppress(FileExistsError):
                temporary.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
                flush(temporary)
                os.link(temporary, path)  # fails where another process was first
        there = read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use the folder {out}: {getattr(error, 'strerror', None) or error}") from error
    for name, asked in asdict(settings).items():
        if there.get(name) != asked:
            raise UserError(
                f"{out} holds latents made with {name} {there.get(name)}, but {asked} is asked for: name another folder"
            )


def encode_shards(
    arguments: argparse.Namespace,
    shards: list[Shard],
    dataset: ClipDataset,
    autoencoder: Autoencoder,
    settings: Settings,
) -> None:
    """Encode shards one after the other; the loader reads ahead across their borders."""
    import torch

    from pvdm_fast.data.latents import describe_shard
    from pvdm_fast.data.loader import ClipLoader
    from pvdm_fast.jobs.progress import make_bar

    size = arguments.batch_size
    counts = [-(-len(shard.draws) // size) for shard in shards]
    draws = [list(shard.draws[at : at + size]) for shard in shards for at in range(0, len(shard.draws), size)]
    batches = iter(ClipLoader(dataset, draws, workers=arguments.workers))
    with make_bar(f"{dataset.spec.split} clips", sum(map(len, draws)), unit="clip") as bar:
        for shard, count in zip(shards, counts, strict=True):
            parts, names, labels, skipped = [], [], [], []
            for _ in range(count):
                batch = next(batches)
                parts.append(encode_windows(batch["video"], autoencoder, settings.windows))
                names += batch["names"]
                labels += batch["labels"]
                skipped += batch["skipped"]
                bar.update(len(batch["names"]))
            latents = torch.cat(parts)
            about = describe_shard(settings, latents, names, labels, skipped)
            write_shard(arguments.out, shard, settings, latents, about)


def encode_windows(video: torch.Tensor, autoencoder: Autoencoder, windows: int) -> torch.Tensor:
    """Latents float32 (B, windows, D, N) on the CPU of clips (B, 3, 2T, H, W)."""
    import torch

    from pvdm_fast.diffusion.noise import window_starts

    half = video.shape[2] // 2
    video = video.to(autoencoder.device)
    with torch.no_grad():
        latents = [
            autoencoder.encode(video[:, :, start : start + half]).latent for start in window_starts(half, windows)
        ]
    return torch.stack(latents, 1).float().cpu()


def write_shard(out: Path, shard: Shard, settings: Settings, latents: torch.Tensor, about: dict[str, Any]) -> None:
    """Write one shard, whole or not at all; raises UserError where it cannot be written or is not finite."""
    from pvdm_fast.data.latent_shards import save_shard
    from pvdm_fast.jobs.files import flush

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
    """Write the index if every shard is there; whichever process comes last does."""
    from pvdm_fast.data.latents import INDEX, SPLITS, make_index, shard_problem
    from pvdm_fast.jobs.files import TEMPORARY, flush

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
            for left in out.glob(f"{TEMPORARY}*-{split}-*"):  # of shards, by processes that were killed
                left.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out / INDEX}: {error.strerror or error}") from error
    skipped = len(index["unreadable_files"])
    note = f"; {skipped} files could not be read, see {INDEX}" if skipped else ""
    print(f"{settings.train_clips} training and {settings.test_clips} test clips in {out}{note}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 (a user's error) or 130 (Ctrl-C)."""

    def run() -> None:
        parsed = make_parser().parse_args(arguments)
        from pvdm_fast.jobs.environment import plain_torch

        with plain_torch():
            encode(parsed)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

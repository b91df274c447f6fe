"""``python -m pvdm_fast.encode``: encodes clips once, so that the diffusion stage reads their latents."""

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
    from pvdm_fast.jobs.arguments import THREADS_HELP, Parser
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
    parser.add_argument("data", metavar="DATA", help="videos, as for --data of training")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the latents")
    parser.add_argument("--autoencoder", type=Path, required=True, metavar="RUN", help="its run, or its own folder")
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
        help="how many windows of T frames to encode of each clip's 2T, spread evenly; training draws from T + 1 "
        f"{default}",
    )
    parser.add_argument(
        "--stride", default=1, **number(numbers.STRIDE), help=f"take every n-th frame of a video {default}"
    )
    parser.add_argument("--seed", default=0, **number(numbers.SEED), help=f"seed of the clips {default}")
    parser.add_argument("--flip", action="store_true", help="mirror half of the training clips")
    words = "as for training: where training clips are cut out"
    parser.add_argument("--crop", default="random", metavar="{random,centre}", help=f"{words} {default}")
    words = "as for training: bilinear is the release's, not antialiased"
    parser.add_argument("--resize", default="bicubic", metavar="{bicubic,bilinear}", help=f"{words} {default}")
    parser.add_argument(
        "--fold", default=1, **number(numbers.FOLD), help=f"which of UCF-101's three pairs of lists {default}"
    )
    parser.add_argument("--batch-size", default=8, **number(numbers.BATCH), help=f"clips encoded at once {default}")
    parser.add_argument("--shard-clips", default=512, **number(numbers.VIDEOS), help=f"clips per file {default}")
    parser.add_argument(
        "--container",
        default="safetensors",
        metavar="{safetensors,tar}",
        help=f"tar writes webdataset shards with one sample per clip {default}",
    )
    parser.add_argument(
        "--workers", default=2, **number(numbers.WORKERS), help=f"processes that read clips ahead {default}"
    )
    parser.add_argument(
        "--read-timeout",
        default=READ_TIMEOUT,
        type=numbers.SECONDS,
        metavar="X",
        help=f"seconds that reading a file may take; slower ones are skipped {default}",
    )
    parser.add_argument("--threads", **number(numbers.THREADS), help=THREADS_HELP)
    parser.add_argument("--device", default="auto", type=devices.DEVICE, metavar=devices.METAVAR, help=devices.HELP)
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="{auto,fp32,bf16}",
        help="what the autoencoder computes in, under autocast; auto: bf16 on a GPU that multiplies it, else fp32 "
        "(default: %(default)s)",
    )
    return parser


def encode(arguments: argparse.Namespace) -> None:
    """Encode this process's share of the shards, and write the index if all are there.

    Raises:
        UserError: an option, the autoencoder, the data or the folder doesn't fit.
    """
    import torch

    from pvdm_fast.backends.precision import announce, choose_precision
    from pvdm_fast.data.latents import fingerprint, shard_problem
    from pvdm_fast.jobs.devices import claim_device
    from pvdm_fast.training.initialisation import find_autoencoder

    rank, world, local_rank = check(arguments)
    autoencoder = find_autoencoder(arguments.autoencoder, "--autoencoder")
    frames = int(autoencoder.config["frames"])
    if not 2 <= arguments.windows <= frames + 1:
        raise UserError(
            f"--windows must be from 2 to {frames + 1} (T + 1) for this autoencoder, not {arguments.windows}"
        )
    device = claim_device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    precision = choose_precision(arguments.dtype, device)
    if rank == 0:
        announce(arguments.dtype, precision, "--dtype")
    datasets = {split: open_split(arguments, autoencoder, split) for split in ("train", "test")}
    settings = make_settings(arguments, autoencoder, datasets, fingerprint(autoencoder), precision.name)
    claim(arguments.out, settings)
    shards = [
        shard
        for number, shard in enumerate(settings.shards())
        if number % world == rank and shard_problem(arguments.out / shard.name, shard, settings)
    ]
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


def check(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """This process's number, how many there are, and its number on this machine. Raises UserError for an impossible
    option."""
    from pvdm_fast.data.latent_shards import CONTAINERS
    from pvdm_fast.data.shards import library
    from pvdm_fast.jobs.environment import place_in_job

    if arguments.container not in CONTAINERS:
        raise UserError(f"--container must be one of {', '.join(CONTAINERS)}, not {arguments.container}")
    if arguments.container == "tar":
        library()
    if arguments.dtype not in ("auto", "fp32", "bf16"):
        raise UserError(f"--dtype must be auto, fp32 or bf16, not {arguments.dtype}")
    place = place_in_job(meeting=False)
    return place.rank, place.world, place.local_rank


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
        crop=arguments.crop,
        resize=arguments.resize,
        fold=arguments.fold,
    )
    if isinstance(dataset, LatentClips):
        raise UserError(f"{arguments.data} holds latents already: name the videos that they were made from")
    return dataset


def make_settings(
    arguments: argparse.Namespace,
    autoencoder: Autoencoder,
    datasets: dict[str, ClipDataset],
    fingerprint: str,
    dtype: str,
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
        dtype=dtype,
        crop=spec.crop,
        resize=spec.resize,
        fold=spec.fold,
    )


@contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """A name next to ``path`` that no other process uses. Whatever is left there at the end is removed."""
    from pvdm_fast.jobs.files import TEMPORARY

    temporary = path.with_name(f"{TEMPORARY}{os.uname().nodename}-{os.getpid()}-{path.name}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def claim(out: Path, settings: Settings) -> None:
    """Write the settings of a new folder. Raises UserError if it holds anything made with other settings."""
    from pvdm_fast.data.latents import LATER, SETTINGS
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
    arguments: argparse.Namespace,
    shards: list[Shard],
    dataset: ClipDataset,
    autoencoder: Autoencoder,
    settings: Settings,
) -> None:
    """Encode shards one after another. The loader reads ahead across their borders."""
    import torch

    from pvdm_fast.data.latents import describe_shard
    from pvdm_fast.data.loader import ClipLoader
    from pvdm_fast.jobs import threads
    from pvdm_fast.jobs.progress import make_bar

    size = arguments.batch_size
    counts = [-(-len(shard.draws) // size) for shard in shards]
    draws = [list(shard.draws[at : at + size]) for shard in shards for at in range(0, len(shard.draws), size)]
    loader = ClipLoader(
        dataset, draws, workers=arguments.workers, pin_memory=autoencoder.device.type == "cuda", pixels=True
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
            write_shard(arguments.out, shard, settings, latents, about)


def encode_windows(pixels: torch.Tensor, autoencoder: Autoencoder, settings: Settings) -> torch.Tensor:
    """Latents float32 (B, windows, D, N) on the CPU of clips uint8 (B, 3, 2T, H, W)."""
    import torch

    from pvdm_fast.data.transforms import to_float
    from pvdm_fast.diffusion.noise import window_starts

    half, device = pixels.shape[2] // 2, autoencoder.device
    video = to_float(pixels.to(device, non_blocking=True))
    starts = window_starts(half, settings.windows)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
        latents = [autoencoder.encode(video[:, :, start : start + half]).latent.float() for start in starts]
    return torch.stack(latents, 1).cpu()


def write_shard(out: Path, shard: Shard, settings: Settings, latents: torch.Tensor, about: dict[str, Any]) -> None:
    """Write one shard, complete or not at all. Raises UserError if it can't be written or isn't finite."""
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
    """Write the index if every shard is there. The last process to arrive does it."""
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
            for left in out.glob(f"{TEMPORARY}*-{split}-*"):  # leftovers of killed processes
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
        from pvdm_fast.jobs import threads
        from pvdm_fast.jobs.environment import plain_torch

        with plain_torch(), threads.chosen(parsed.threads, parsed.device):
            encode(parsed)

    return run_command(run, "take a smaller --batch-size, or --dtype bf16")


if __name__ == "__main__":
    sys.exit(main())

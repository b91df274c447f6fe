"""``python -m pvdm_fast.encode``: encodes clips once, so that the diffusion stage reads their latents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.command import run_command


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
    from pvdm_fast.jobs.devices import claim_device
    from pvdm_fast.training.encoding import Encoding
    from pvdm_fast.training.encoding import encode as encode_clips
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
    wanted = Encoding(**{item.name: getattr(arguments, item.name) for item in fields(Encoding)})
    encode_clips(wanted, autoencoder.to(device), precision.name, rank, world)


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

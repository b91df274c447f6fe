"""``python -m pvdm_fast.sample RUN``: videos from a trained run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.allocator import keep_freed_memory
from pvdm_fast.jobs.command import run_command

if TYPE_CHECKING:
    from torch import Tensor

    from pvdm_fast.models import Autoencoder, Denoiser

    Append = Callable[[Tensor], None]

SUFFIXES = (".mp4", ".gif", ".npy")


def make_parser() -> argparse.ArgumentParser:
    from pvdm_fast.jobs import devices, numbers
    from pvdm_fast.jobs.arguments import THREADS_HELP, Parser

    parser = Parser(
        prog="python -m pvdm_fast.sample",
        description="Samples videos from a trained run. Frames beyond the model's length are generated clip after "
        "clip, each conditioned on the one before. The same seed gives the same file.",
    )
    parser.add_argument("run", type=Path, help="the folder that training left, with autoencoder/ and denoiser/")
    parser.add_argument(
        "--clips", type=numbers.VIDEOS, default=4, metavar="N", help="number of videos (default: %(default)s)"
    )
    parser.add_argument(
        "--frames", type=numbers.FRAMES, metavar="N", help="frames of a video (default: the model's length)"
    )
    parser.add_argument(
        "--steps",
        type=numbers.SAMPLING_STEPS,
        default=numbers.DEFAULT_STEPS,
        metavar="N",
        help="denoising steps (default: %(default)s)",
    )
    parser.add_argument(
        "--scheduler",
        default="auto",
        metavar="NAME",
        help="sampler: ddim, ddpm, dpm++ or unipc; for a model trained with --diffusion-prediction flow unipc, dpm++, "
        "euler or heun (default: auto, which is ddim, or unipc for such a model)",
    )
    parser.add_argument(
        "--guidance",
        type=numbers.GUIDANCE,
        default=0.0,
        metavar="W",
        help="how strongly clips follow the one before, and the class: (1 + W) eps(cond) - W eps(none) "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--condition",
        type=Path,
        metavar="VIDEO",
        help="a video file, or folder of frames, that the samples continue: its last frames, cropped and resized",
    )
    parser.add_argument(
        "--stride",
        type=numbers.STRIDE,
        default=1,
        metavar="N",
        help="of --condition take every N-th frame (default: %(default)s)",
    )
    parser.add_argument("--class", dest="label", metavar="NAME|NUMBER", help="of a model trained with classes")
    parser.add_argument(
        "--eta",
        type=numbers.ETA,
        default=numbers.DEFAULT_ETA,
        metavar="X",
        help="ddim: share of new noise (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=numbers.SEED, default=0, metavar="N", help="seed of all noise (default: %(default)s)"
    )
    parser.add_argument(
        "--fps", type=numbers.FPS, default=8.0, metavar="X", help="frames a second (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", type=devices.DEVICE, metavar=devices.METAVAR, help=devices.HELP)
    parser.add_argument("--threads", type=numbers.THREADS, metavar="N", help=THREADS_HELP)
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="{auto,fp32,bf16}",
        help="of weights and activations; auto: bf16 on a GPU that multiplies it, else fp32; bf16 falls back to fp32 "
        "where the units for it are missing (default: %(default)s)",
    )
    parser.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="replay the denoiser's pass as a CUDA graph in every step, which has not yet been run on a GPU (default: "
        "on a GPU, if its first step equals the ungraphed one)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.mp4"),
        metavar="FILE",
        help="mp4 or gif: the videos side by side; npy: uint8 (clips, frames, height, width, 3); written as it is "
        "sampled (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write over --out where it exists")
    return parser


def load_models(run: Path, device: str, dtype: str) -> tuple[Autoencoder, Denoiser]:
    """The models of a run in eval mode; ``dtype`` "auto", "fp32" or "bf16"; raises UserError where one is missing."""

    from pvdm_fast.backends.precision import announce, choose_precision
    from pvdm_fast.diffusion.pipeline import MODELS, load_part
    from pvdm_fast.jobs.devices import claim_device

    place = claim_device(device)
    precision = choose_precision(dtype, place)
    announce(dtype, precision, "--dtype")
    autoencoder, denoiser = (load_part(run, name, precision.dtype).to(place).eval() for name in MODELS)
    return autoencoder, denoiser


def write(path: Path, pieces: Iterable[Tensor], clips: int, frames: int, fps: float) -> None:
    """Write ``clips`` videos of ``frames`` frames as they come, in pieces (B, 3, t, H, W) in [-1, 1]. None is kept.

    The suffix chooses the format. Raises UserError if the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_array(path, frames) if path.suffix.lower() == ".npy" else _open_grid(path, clips, fps) as append:
            for piece in pieces:
                append(piece)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _open_grid(path: Path, clips: int, fps: float) -> Iterator[Append]:
    """Opens a file with the videos side by side."""
    from pvdm_fast.data import open_video, video_grid

    with open_video(path, fps) as append:
        yield lambda piece: append(video_grid(piece, columns=max(1, round(clips**0.5))))


@contextmanager
def _open_array(path: Path, frames: int) -> Iterator[Append]:
    """A numpy file uint8 (clips, frames, height, width, 3), with each piece written to its place.

    It isn't a memory map: a full disk would end the process. Here it is an OSError.
    """
    import numpy as np

    from pvdm_fast.data import video_grid
    from pvdm_fast.data.video_writer import whole_video

    with whole_video(path) as temporary, temporary.open("wb") as file:
        done, start = 0, 0

        def append(piece: Tensor) -> None:
            nonlocal done, start
            clips, colours, length, height, width = piece.shape
            if done == 0:
                shape = (clips, frames, height, width, colours)
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                start = file.tell()
            for index, video in enumerate(piece):
                file.seek(start + (index * frames + done) * height * width * colours)
                file.write(video_grid(video[None], columns=1).data)
            done += length

        yield append


def run_sampling(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, sample, write."""
    options = make_parser().parse_args(arguments)
    _check(options)
    from pvdm_fast.jobs import threads
    from pvdm_fast.jobs.environment import plain_torch

    with plain_torch(), threads.chosen(options.threads, options.device):
        _sample(options)


def _sample(options: argparse.Namespace) -> None:
    from pvdm_fast.data.continuation import last_clip
    from pvdm_fast.diffusion.pipeline import class_numbers
    from pvdm_fast.diffusion.sampling import SamplingOptions, fitting_scheduler, stream_video
    from pvdm_fast.jobs.progress import make_bar

    autoencoder, denoiser = load_models(options.run, options.device, options.dtype)
    size = {name: int(autoencoder.config[name]) for name in ("frames", "height", "width")}
    frames = size["frames"] if options.frames is None else options.frames
    condition = options.condition and last_clip(options.condition, **size, stride=options.stride)
    labels = None if options.label is None else class_numbers(denoiser, options.label, options.clips)
    wanted = SamplingOptions(
        clips=options.clips,
        frames=frames,
        steps=options.steps,
        scheduler=options.scheduler,
        guidance=options.guidance,
        eta=options.eta,
        seed=options.seed,
        condition=condition,
        labels=labels,
        cuda_graph=options.cuda_graph,
    )
    fitting_scheduler(denoiser, wanted)  # before a file is begun
    with make_bar("sampling", options.steps) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        pieces = stream_video(autoencoder, denoiser, wanted, progress=progress)
        write(options.out, pieces, options.clips, frames, options.fps)
    print(f"{options.clips} videos of {frames} frames, {size['height']}x{size['width']}, written to {options.out}")


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for what argparse can't check."""
    if options.out.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot write {options.out}: its name must end in {', '.join(SUFFIXES)}")
    from pvdm_fast.diffusion.schedulers import check_name
    from pvdm_fast.jobs import numbers

    check_name(options.scheduler)
    numbers.check_eta(options.scheduler, options.eta)
    if options.out.exists() and not options.overwrite:
        raise UserError(
            f"{options.out} already exists: name another file with --out, or write over it with --overwrite"
        )
    if options.dtype not in ("auto", "fp32", "bf16"):
        raise UserError(f"--dtype must be auto, fp32 or bf16, not {options.dtype!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    keep_freed_memory()
    return run_command(lambda: run_sampling(arguments), "take fewer --clips, or --dtype bf16")


if __name__ == "__main__":
    sys.exit(main())

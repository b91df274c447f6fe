"""``python -m pvdm_fast.sample RUN``: videos from a trained run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pvdm_fast.allocator import keep_freed_memory
from pvdm_fast.errors import UserError, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from pvdm_fast.models import Autoencoder, Denoiser

SUFFIXES = (".mp4", ".gif", ".npy")


def make_parser() -> argparse.ArgumentParser:
    from pvdm_fast.training.options import Parser

    parser = Parser(
        prog="python -m pvdm_fast.sample",
        description="Samples videos from a trained run. Frames beyond the model's length are generated clip after "
        "clip, each conditioned on the one before. The same seed gives the same file.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="the folder that training left, with autoencoder/ and denoiser/")
    parser.add_argument("--clips", type=int, default=4, metavar="N", help="number of videos (default: %(default)s)")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of a video (default: the model's length)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--scheduler", default="ddim", metavar="{ddim,ddpm,dpm++}", help="sampler (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        metavar="W",
        help="how strongly later clips follow the one before: (1 + W) eps(cond) - W eps(none) (default: %(default)s)",
    )
    parser.add_argument(
        "--eta", type=float, default=1.0, metavar="X", help="ddim: share of new noise (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all noise (default: %(default)s)")
    parser.add_argument("--fps", type=float, default=8.0, metavar="X", help="frames a second (default: %(default)s)")
    parser.add_argument("--device", default="auto", metavar="{auto,cpu}", help="auto takes the GPU if there is one")
    parser.add_argument(
        "--dtype",
        default="fp32",
        metavar="{fp32,bf16}",
        help="of weights and activations; a CPU without bf16 units takes fp32 (default: %(default)s)",
    )
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="replay the denoiser's pass as a CUDA graph in every step; needs a GPU, and has not yet been run on one",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.mp4"),
        metavar="FILE",
        help="mp4 or gif: the videos side by side; npy: uint8 (clips, frames, height, width, 3) (default: %(default)s)",
    )
    return parser


def load_models(run: Path, device: str, dtype: str) -> tuple[Autoencoder, Denoiser]:
    """The models of a run in eval mode, in float32 or bfloat16; raises UserError where one is missing."""
    import torch

    from pvdm_fast.checkpoints import load_model
    from pvdm_fast.models import Autoencoder, Denoiser
    from pvdm_fast.precision import bfloat16_serves

    for name in ("autoencoder", "denoiser"):
        if not (run / name / "config.json").is_file():
            raise UserError(f"there is no trained {name} in {run / name}: train it, or finish with --resume {run}")
    place = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu"
    low = dtype == "bf16" and bfloat16_serves(place, "--dtype bf16")
    compute = torch.bfloat16 if low else torch.float32
    return (
        load_model(Autoencoder, run / "autoencoder", compute).to(place).eval(),
        load_model(Denoiser, run / "denoiser", compute).to(place).eval(),
    )


def write(path: Path, videos: Tensor, fps: float) -> None:
    """Write videos (B, 3, T, H, W) in [-1, 1] as the suffix says; raises UserError where the file cannot be written."""
    from pvdm_fast.data import video_grid, write_video

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".npy":
            import numpy as np

            from pvdm_fast.training.files import whole_file

            pixels = np.stack([video_grid(video[None], columns=1) for video in videos])
            with whole_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, pixels)
        else:
            columns = max(1, round(len(videos) ** 0.5))
            write_video(path, video_grid(videos, columns=columns), fps)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def run_sampling(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, sample, write."""
    options = make_parser().parse_args(arguments)
    from pvdm_fast.pipeline import sample_video
    from pvdm_fast.training.progress import make_bar

    if options.out.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot write {options.out}: its name must end in {', '.join(SUFFIXES)}")
    if options.device not in ("auto", "cpu"):
        raise UserError(f"--device must be auto or cpu, not {options.device!r}")
    if options.dtype not in ("fp32", "bf16"):
        raise UserError(f"--dtype must be fp32 or bf16, not {options.dtype!r}")
    if not options.fps > 0:
        raise UserError(f"--fps must be positive, not {options.fps}")
    autoencoder, denoiser = load_models(options.run, options.device, options.dtype)
    with make_bar("sampling", options.steps) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        videos = sample_video(
            autoencoder,
            denoiser,
            clips=options.clips,
            frames=denoiser.layout.time if options.frames is None else options.frames,
            steps=options.steps,
            scheduler=options.scheduler,
            guidance=options.guidance,
            eta=options.eta,
            seed=options.seed,
            cuda_graph=options.cuda_graph,
            progress=progress,
        )
    write(options.out, videos, options.fps)
    clips, _, frames, height, width = videos.shape
    print(f"{clips} videos of {frames} frames, {height}x{width}, written to {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    keep_freed_memory()
    return run_command(lambda: run_sampling(arguments))


if __name__ == "__main__":
    sys.exit(main())

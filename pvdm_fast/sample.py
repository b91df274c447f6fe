"""``python -m pvdm_fast.sample RUN``: videos from a trained run."""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvdm_fast.errors import UserError
from pvdm_fast.jobs import numbers
from pvdm_fast.jobs.allocator import keep_freed_memory
from pvdm_fast.jobs.command import run_command

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from tqdm import tqdm

    from pvdm_fast.diffusion.sampling import SamplingOptions
    from pvdm_fast.models import Autoencoder, Denoiser

SUFFIXES = ("mp4", "gif", "npy")  # of one file with all videos
FRAME_RATES = ("mp4", "gif")  # what holds one


def make_parser() -> argparse.ArgumentParser:
    from pvdm_fast.jobs import devices
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
        "--clips-from",
        type=numbers.FIRST_VIDEO,
        default=0,
        metavar="I",
        help="number of the first of them: a video depends on the seed and its number alone (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=numbers.BATCH,
        default=8,
        metavar="N",
        help="videos that are sampled at a time; memory grows with them, not with --clips (default: %(default)s)",
    )
    parser.add_argument(
        "--frames", type=numbers.FRAMES, metavar="N", help="frames of a video (default: the model's length)"
    )
    parser.add_argument(
        "--steps",
        type=numbers.SAMPLING_STEPS,
        metavar="N",
        help=f"denoising steps (default: the run's, else {numbers.DEFAULT_STEPS}, or as many as it was distilled for)",
    )
    parser.add_argument(
        "--scheduler",
        default="auto",
        metavar="NAME",
        help="sampler: ddim, ddpm, dpm++ or unipc; for a model trained with --diffusion-prediction flow unipc, dpm++, "
        "euler, heun or stochastic (default: auto, which is the run's, else ddim, or unipc for such a model)",
    )
    parser.add_argument(
        "--guidance",
        type=numbers.GUIDANCE,
        metavar="W",
        help="how strongly clips follow the one before, and the class: (1 + W) eps(cond) - W eps(none) "
        "(default: the run's, else 0)",
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
        metavar="N",
        help="of --condition take every N-th frame (default: 1)",
    )
    parser.add_argument(
        "--class",
        dest="label",
        metavar="NAME|NUMBER",
        help="of a model trained with classes; none: without one (default: each in turn)",
    )
    parser.add_argument(
        "--eta",
        type=numbers.ETA,
        metavar="X",
        help=f"ddim: share of new noise (default: {numbers.DEFAULT_ETA})",
    )
    parser.add_argument(
        "--seed", type=numbers.SEED, default=0, metavar="N", help="seed of all noise (default: %(default)s)"
    )
    parser.add_argument(
        "--fps", type=numbers.FPS, metavar="X", help="mp4, gif: frames a second (default: the run's --fps)"
    )
    parser.add_argument(
        "--crf",
        type=numbers.CRF,
        metavar="N",
        help="mp4: x264's quality, 0 is lossless, 51 the smallest file (default: 18)",
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
        default="samples.mp4",
        metavar="FILE|DIR/",
        help="mp4 or gif: the videos side by side; npy: uint8 (clips, frames, height, width, 3); a folder: a file for "
        "each video, and those that are there already aren't made again (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        metavar="{mp4,gif,npy,png}",
        help="of the files in a folder; png: a folder of pictures for each video (default: mp4)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write over files that exist")
    return parser


def load_models(run: Path, device: str, dtype: str) -> tuple[Autoencoder, Denoiser]:
    """The models of a run in eval mode; ``dtype`` "auto", "fp32" or "bf16"; raises UserError where one is missing."""

    from pvdm_fast.backends.precision import announce, choose_precision
    from pvdm_fast.diffusion.pipeline import MODELS, load_part
    from pvdm_fast.jobs.devices import claim_device
    from pvdm_fast.jobs.files import expect_folder

    expect_folder(run)
    place = claim_device(device)
    precision = choose_precision(dtype, place)
    announce(dtype, precision, "--dtype")
    autoencoder, denoiser = (load_part(run, name, precision.dtype).to(place).eval() for name in MODELS)
    return autoencoder, denoiser


def run_sampling(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, sample, write."""
    options = make_parser().parse_args(arguments)
    _check(options)
    from pvdm_fast.jobs import threads
    from pvdm_fast.jobs.environment import plain_torch

    with plain_torch(), threads.chosen(options.threads, options.device):
        _sample(options)


@dataclass(frozen=True)
class _Sampler:
    """What samples batches of clips, each clip by its number."""

    autoencoder: Autoencoder
    denoiser: Denoiser
    wanted: SamplingOptions  # of one clip
    seed: int
    predict: Callable[..., Tensor]
    passes: int  # of the denoiser for a clip of the model's length

    def stream(self, bar: tqdm[Any], clips: range) -> Iterator[np.ndarray]:
        """These clips, in pieces uint8 (B, t, H, W, 3)."""
        from pvdm_fast.data.video_writer import to_pixels
        from pvdm_fast.diffusion.sampling import NoiseSource, classes_in_turn, stream_video

        one = self.wanted.labels
        labels = classes_in_turn(self.denoiser, clips) if one is None else one.expand(len(clips))
        noise = NoiseSource.of_clips(self.seed, clips)
        batch = replace(self.wanted, clips=len(clips), seed=noise, labels=labels)
        pieces = stream_video(
            self.autoencoder, self.denoiser, batch, predict=self.predict, progress=lambda done, total: bar.update()
        )
        return map(to_pixels, pieces)

    def bar(self, batches: Sequence[range]) -> tqdm[Any]:
        """Counts the denoiser's passes over these batches."""
        from pvdm_fast.jobs.progress import make_bar

        return make_bar("sampling", len(batches) * self.rounds * self.passes)

    @property
    def rounds(self) -> int:
        return math.ceil(self.wanted.frames / self.denoiser.layout.time)


def _sample(options: argparse.Namespace) -> None:
    from pvdm_fast.data.continuation import last_clip
    from pvdm_fast.data.sampled_videos import check_grid
    from pvdm_fast.diffusion.cuda_graph import choose_prediction
    from pvdm_fast.diffusion.pipeline import NO_CLASS, class_numbers
    from pvdm_fast.diffusion.sampling import (
        SamplingOptions,
        check_pair,
        fitting_guidance,
        fitting_scheduler,
        fitting_steps,
        passes,
    )
    from pvdm_fast.diffusion.schedulers import fitting_name

    autoencoder, denoiser = load_models(options.run, options.device, options.dtype)
    check_pair(autoencoder, denoiser)
    size = {name: int(autoencoder.config[name]) for name in ("frames", "height", "width")}
    frames = size["frames"] if options.frames is None else options.frames
    classed = denoiser.config["num_classes"] is not None and options.label != NO_CLASS
    if options.guidance and options.condition is None and frames <= size["frames"] and not classed:
        raise UserError(
            f"--guidance has nothing to follow: give a --class, a --condition, or more --frames than {size['frames']}, "
            "or leave it out"
        )
    _check_eta(options.eta, fitting_name(denoiser, options.scheduler))
    options.fps = _frame_rate(options.run) if options.fps is None else options.fps
    if not options.folder and options.format != "npy":
        check_grid(options.clips, size["height"], size["width"])
    steps = fitting_steps(denoiser, options.steps)
    wanted = SamplingOptions(
        clips=1,
        frames=frames,
        steps=steps,
        scheduler=options.scheduler,
        guidance=fitting_guidance(denoiser, options.guidance),
        eta=numbers.DEFAULT_ETA if options.eta is None else options.eta,
        condition=options.condition and last_clip(options.condition, **size, stride=options.stride or 1),
        labels=None if options.label is None else class_numbers(denoiser, options.label, 1),
    )
    end = options.clips_from + options.clips
    starts = range(options.clips_from, end, options.batch_size)
    batches = [range(start, min(end, start + options.batch_size)) for start in starts]
    each = passes(fitting_scheduler(denoiser, wanted), steps)
    predict = choose_prediction(denoiser, options.cuda_graph, len(batches) * math.ceil(frames / size["frames"]) * each)
    sampler = _Sampler(autoencoder, denoiser, wanted, options.seed, predict, each)
    write = _write_folder if options.folder else _write_array if options.format == "npy" else _write_grid
    try:
        note = write(options, sampler, batches)
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror or error}") from error
    print(
        f"{options.clips} videos of {frames} frames, {size['height']}x{size['width']}, written to {options.out}{note}"
    )


def _write_grid(options: argparse.Namespace, sampler: _Sampler, batches: list[range]) -> str:
    """All videos side by side. Of each batch the next frames are sampled, before those that follow of any."""
    from pvdm_fast.data.sampled_videos import open_grid

    options.out.parent.mkdir(parents=True, exist_ok=True)
    with sampler.bar(batches) as bar, open_grid(options.out, options.fps, options.crf) as append:
        streams = [sampler.stream(bar, batch) for batch in batches]
        for _ in range(sampler.rounds):
            append([next(stream) for stream in streams])
    return ""


def _write_array(options: argparse.Namespace, sampler: _Sampler, batches: list[range]) -> str:
    """One batch after the other, each to its place."""
    from pvdm_fast.data.sampled_videos import open_array

    options.out.parent.mkdir(parents=True, exist_ok=True)
    with sampler.bar(batches) as bar, open_array(options.out, options.clips, sampler.wanted.frames) as append:
        for batch in batches:
            frame = 0
            for pixels in sampler.stream(bar, batch):
                append(batch.start - options.clips_from, frame, pixels)
                frame += pixels.shape[1]
    return ""


def _write_folder(options: argparse.Namespace, sampler: _Sampler, batches: list[range]) -> str:
    """A file for each clip. Batches whose files are all there are passed over; of others the missing ones are written.

    Batches stay as they are then, since a clip's last bits depend on its batch.
    """
    from pvdm_fast.data.sampled_videos import VideoFolder

    folder = VideoFolder(options.out, options.format, options.fps, options.crf)
    with folder.claimed(_facts(options, sampler)):
        wanted = [folder.missing(options.seed, batch, options.overwrite) for batch in batches]
        there = done = options.clips - sum(map(len, wanted))
        try:
            with sampler.bar([batch for batch, rows in zip(batches, wanted, strict=True) if rows]) as bar:
                for batch, rows in zip(batches, wanted, strict=True):
                    bar.set_postfix_str(f"{done} of {options.clips} videos", refresh=False)
                    if rows:
                        with folder.open(options.seed, [batch[row] for row in rows]) as writers:
                            for pixels in sampler.stream(bar, batch):
                                for row, write in zip(rows, writers, strict=True):
                                    write(pixels[row])
                        done += len(rows)
                bar.set_postfix_str(f"{done} of {options.clips} videos")
        except KeyboardInterrupt:
            print(f"{done} of {options.clips} videos are written; the same command goes on from here", file=sys.stderr)
            raise
    return f" ({there} of them were there already)" if there else ""


def _facts(options: argparse.Namespace, sampler: _Sampler) -> dict[str, Any]:
    """What decides the clips of a folder, besides their seed and number."""
    from pvdm_fast.data.video_writer import DEFAULT_CRF
    from pvdm_fast.evaluation.subject import model_facts

    wanted, models = sampler.wanted, {"autoencoder": sampler.autoencoder, "denoiser": sampler.denoiser}
    condition, form = wanted.condition, options.format
    return {
        **{name: model_facts(model, options.run / name) for name, model in models.items()},
        **{name: getattr(wanted, name) for name in ("frames", "steps", "scheduler", "guidance", "eta")},
        "class": None if wanted.labels is None else int(wanted.labels[0]),
        "condition": None if condition is None else hashlib.sha256(condition.numpy().tobytes()).hexdigest(),
        "format": form,
        "fps": options.fps if form in FRAME_RATES else None,
        "crf": (DEFAULT_CRF if options.crf is None else options.crf) if form == "mp4" else None,
    }


def _frame_rate(run: Path) -> float:
    """The run's frames a second, or the usual ones of a folder without config.yaml."""
    from pvdm_fast.training.hyperparameters import VideoOptions
    from pvdm_fast.training.run_folder import RunFolder

    folder = RunFolder(run)
    return folder.read_config().video.fps if folder.config.is_file() else VideoOptions.fps


def _check(options: argparse.Namespace) -> None:
    """Completes the options that depend on each other. Raises UserError for what argparse can't check."""
    from pvdm_fast.data.sampled_videos import FORMATS
    from pvdm_fast.diffusion.schedulers import check_name

    options.folder = options.out.endswith("/") or Path(options.out).is_dir()
    options.out = Path(options.out)
    if options.format is not None and options.format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, not {options.format!r}")
    suffix = options.out.suffix.lower().removeprefix(".")
    if not options.folder and suffix not in SUFFIXES:
        raise UserError(
            f"cannot write {options.out}: its name must end in {', '.join(f'.{name}' for name in SUFFIXES)}, or in / "
            "for a folder with a file for each clip"
        )
    if options.dtype not in ("auto", "fp32", "bf16"):
        raise UserError(f"--dtype must be auto, fp32 or bf16, not {options.dtype!r}")
    check_name(options.scheduler)
    _check_eta(options.eta, options.scheduler)
    _check_effects(options, (options.format or FORMATS[0]) if options.folder else suffix)
    if not options.folder and options.out.exists() and not options.overwrite:
        raise UserError(
            f"{options.out} already exists: name another file with --out, or write over it with --overwrite"
        )
    options.format = (options.format or FORMATS[0]) if options.folder else suffix


def _check_eta(eta: float | None, scheduler: str) -> None:
    """Raises UserError for an --eta that this scheduler has no use for. What "auto" is, the model decides."""
    if eta is not None and scheduler not in ("auto", "ddim"):
        raise UserError(f"--eta is DDIM's share of new noise, and {scheduler} has none: leave it out, or take ddim")


def _check_effects(options: argparse.Namespace, form: str) -> None:
    """Raises UserError for an option that would change nothing where ``form`` is written."""
    from pvdm_fast.data.video_writer import has_x264

    for name, vain, reason in (
        ("stride", options.condition is None, "chooses frames of --condition: give a video with it"),
        ("format", not options.folder, f"is for a folder (--out DIR/), and {options.out} says its format itself"),
        ("fps", form not in FRAME_RATES, f"is for {' and '.join(FRAME_RATES)}, and {form} holds no frame rate"),
        ("crf", form != "mp4", f"is the quality of mp4, and {form} has none"),
        ("crf", not has_x264(), "is x264's, and this PyAV was built without it: install another"),
    ):
        if getattr(options, name) is not None and vain:
            raise UserError(f"--{name} {reason}, or leave it out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    keep_freed_memory()
    return run_command(lambda: run_sampling(arguments), "take a smaller --batch-size, or --dtype bf16")


if __name__ == "__main__":
    sys.exit(main())

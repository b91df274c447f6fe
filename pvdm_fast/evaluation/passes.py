"""The passes of an evaluation: reconstructions, real clips of other lengths, samples. In batches, and resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdm_fast.data import ClipDataset, video_grid, write_video
from pvdm_fast.data.shapes import KINDS
from pvdm_fast.errors import Interrupted, UserError
from pvdm_fast.evaluation.clips import read_batches
from pvdm_fast.evaluation.features import Networks
from pvdm_fast.evaluation.processes import wait
from pvdm_fast.evaluation.scene_judge import see
from pvdm_fast.evaluation.scenes import clip_features, clip_scores, first_frames, kinds_right, of_class
from pvdm_fast.evaluation.ssim import WINDOW, ssim
from pvdm_fast.evaluation.subject import Subject
from pvdm_fast.evaluation.tally import Measured, Tally, read_tallies, remaining, total
from pvdm_fast.jobs import threads
from pvdm_fast.jobs.interrupt import StopRequest
from pvdm_fast.jobs.processes import Processes
from pvdm_fast.jobs.progress import make_bar
from pvdm_fast.losses.psnr import psnr

if TYPE_CHECKING:
    from pvdm_fast.models import Denoiser

SHOWN = 8
SHOWN_SIDE = 160
MAX_PSNR = 100.0
SAMPLE_FILES = ("clip-N.mp4", "clip-N.npy")

Measure = Callable[[Sequence[range], Path], Iterator[Measured]]


@dataclass(frozen=True)
class Pass:
    """One thing to measure on ``clips`` clips.

    ``identity`` is everything that decides the values. Statistics of another identity lie in another folder.
    ``measure`` takes batches of clip numbers and the pass's folder (for videos), and yields what it measured on each
    batch. ``files``: what it leaves of each of the first ``shown`` clips, with N for the number.
    """

    name: str
    clips: int
    batch_size: int
    identity: dict[str, Any]
    measure: Measure
    shown: int = 0
    files: tuple[str, ...] = ("clip-N.mp4",)

    def unseen(self, folder: Path) -> list[range]:
        """Batches with a clip that is to be shown, and of which a file is missing."""

        def missing(number: int) -> bool:
            return any(not (folder / name.replace("N", str(number))).exists() for name in self.files)

        return [batch for batch in self.batches if any(missing(number) for number in batch if number < self.shown)]

    @property
    def batches(self) -> list[range]:
        starts = range(0, self.clips, self.batch_size)
        return [range(first, min(self.clips, first + self.batch_size)) for first in starts]

    def folder(self, parent: Path) -> Path:
        identity = {"clips": self.clips, "batch_size": self.batch_size, **self.identity}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return parent / f"{self.name}-{digest[:16]}"


@dataclass(frozen=True)
class Outcome:
    """Moments and rows by name, files that couldn't be read, and the folder of the videos."""

    sums: dict[str, Tensor]
    rows: dict[str, Tensor]
    unreadable: dict[str, str]
    folder: Path


def run_pass(work: Pass, parent: Path, processes: Processes, stop: StopRequest, save_every: int) -> Outcome:
    """Do the rest of a pass, together with the other processes, and add everything up.

    The rest is divided again at each start. So an interrupted pass can continue with another number of processes. Every
    process writes its own file.

    Raises:
        Interrupted: a signal came, and what was done is saved.
        UserError: the statistics couldn't be written, or the processes don't see each other's files.
    """
    folder, batches, share = work.folder(parent), work.batches, processes.share
    tallies = read_tallies(folder, len(batches))
    name = f"part-{share.rank}.safetensors"
    own = tallies.get(name) or Tally(folder / name, len(batches))
    todo = remaining(list(tallies.values()), len(batches))
    wait(processes)  # everybody reads before anybody writes
    mine = todo[share.rank :: share.world]
    unsaved = 0
    done = work.clips - sum(len(batches[number]) for number in todo)
    with make_bar(work.name, work.clips, done=done, unit="clip", shown=processes.main) as bar:
        for number, measured in zip(mine, work.measure([batches[n] for n in mine], folder), strict=True):
            own.add(number, measured)
            unsaved += len(batches[number])
            if unsaved >= save_every or stop.number is not None:
                own.save()
                unsaved = 0
            if stop.number is not None:  # each process for itself, because they have different numbers of batches
                raise Interrupted(stop.number)
            bar.update(len(batches[number]) * share.world)
    if unsaved:
        own.save()
    wait(processes)
    # an earlier evaluation showed fewer, or its videos were removed
    for _ in work.measure(work.unseen(folder)[share.rank :: share.world], folder):
        if stop.number is not None:
            raise Interrupted(stop.number)
    wait(processes)
    tallies = read_tallies(folder, len(batches))
    if missing := remaining(list(tallies.values()), len(batches)):
        raise UserError(
            f"{len(missing)} of {len(batches)} batches of other processes are missing in {folder}: "
            "all processes must see one folder, so name a shared one with --out"
        )
    return Outcome(*total(list(tallies.values())), folder)


def measure_reconstructions(
    subject: Subject, dataset: ClipDataset, networks: Networks, workers: int, shown: int
) -> Measure:
    """Measures PSNR, SSIM (if frames are large enough), and the features of originals and reconstructions. With a judge
    also which objects keep their names, and the originals' features for it."""

    def measure(batches: Sequence[range], folder: Path) -> Iterator[Measured]:
        for numbers, batch in zip(batches, read_batches(dataset, batches, workers), strict=True):
            original = batch["video"].to(subject.autoencoder.device)
            with threads.unit("reconstruction"):
                result = subject.reconstruct(original)
            measured = networks.measure({"original": original, "reconstruction": result})
            measured.values["psnr"] = psnr(result, original).clamp_max(MAX_PSNR)[:, None]
            if min(subject.size) >= WINDOW:
                measured.values["ssim"] = ssim(result, original)[:, None]
            if networks.judge is not None:
                seen = see(networks.judge, original)
                measured.values["kinds_right"] = kinds_right(seen, see(networks.judge, result))
                measured.values["scenes"] = clip_features(seen)
            measured.unreadable.update(batch["skipped"])
            show(folder, numbers, torch.stack([original, result], dim=1), subject.fps, shown)
            yield measured

    return measure


def measure_real_clips(dataset: ClipDataset, networks: Networks, workers: int) -> Measure:
    """Measures the features of real clips."""

    def measure(batches: Sequence[range], folder: Path) -> Iterator[Measured]:
        for batch in read_batches(dataset, batches, workers):
            measured = networks.measure({"original": batch["video"]})
            measured.unreadable.update(batch["skipped"])
            yield measured

    return measure


def measure_samples(
    subject: Subject, networks: Networks, lengths: Sequence[int], stride: int, sampling: dict[str, Any], shown: int
) -> Measure:
    """Samples videos of the greatest length. For every length, measures the features of their first frames. With a
    judge, names the objects of the first two clips, which may be of ``stride``.

    A sample's first frames don't depend on its length, because each clip is conditioned only on the one before. Those
    that are shown leave their first clip's frames as clip-N.npy too.
    """
    assert subject.denoiser is not None
    clip, denoiser = subject.frames, subject.denoiser
    longest = max([*lengths, 2 * clip] if networks.judge is not None else lengths)

    def measure(batches: Sequence[range], folder: Path) -> Iterator[Measured]:
        for numbers in batches:
            videos = sample_batch(subject, numbers, longest, sampling)
            show(folder, numbers, videos[:, None, :, : max(lengths)], subject.fps, shown)
            for number, video in zip(numbers, videos[:, :, :clip], strict=True):
                if number < shown:
                    write_video(folder / f"clip-{number}.npy", video_grid(video[None], columns=1))
            measured = networks.measure({f"{n} frames": videos[:, :, :n] for n in lengths})
            if networks.judge is not None:
                seen = see(networks.judge, videos[:, :, : 2 * clip])
                scores = clip_scores(seen, clip, stride).items()
                measured.values.update({name: score[:, None] for name, score in scores})
                measured.values["scenes"] = clip_features(first_frames(seen, clip))
                if classes := kinds_asked_for(denoiser, numbers):
                    measured.values["of_class"] = of_class(seen, classes)
            yield measured

    return measure


def kinds_asked_for(denoiser: Denoiser, numbers: range) -> list[str]:
    """The class of each of these samples, where classes are the kinds of rendered scenes; else an empty list."""
    from pvdm_fast.diffusion.sampling import names_in_turn

    of_scenes = set(denoiser.config["class_names"] or ()) == set(KINDS)
    return names_in_turn(denoiser, numbers) if of_scenes else []


def sample_batch(subject: Subject, numbers: range, frames: int, sampling: dict[str, Any]) -> Tensor:
    """The samples with these numbers, (B, 3, frames, H, W) in [-1, 1]. The noise of each depends only on the seed and
    its number."""
    from pvdm_fast.diffusion.sampling import NoiseSource, SamplingOptions, classes_in_turn, sample_video

    assert subject.denoiser is not None
    options = SamplingOptions(
        clips=len(numbers),
        frames=frames,
        seed=NoiseSource.of_clips(sampling["seed"], numbers),
        labels=classes_in_turn(subject.denoiser, numbers),
        **{name: sampling[name] for name in ("steps", "scheduler", "guidance", "eta")},
    )
    return sample_video(subject.autoencoder, subject.denoiser, options)


def show(folder: Path, numbers: Sequence[int], videos: Tensor, fps: float, shown: int) -> None:
    """Write the first ``shown`` clips as mp4, with the videos (n, 3, T, H, W) of each clip side by side. Small ones are
    enlarged by whole factors."""
    for number, row in zip(numbers, videos, strict=True):
        if number >= shown:
            return
        factor = max(1, SHOWN_SIDE // min(row.shape[-2:]))
        enlarged = row.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"clip-{number}.mp4", video_grid(enlarged, columns=len(row)), fps)
        except OSError as error:
            raise UserError(
                f"cannot write the video of clip {number} to {folder}: {error.strerror or error}"
            ) from error

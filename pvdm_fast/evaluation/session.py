"""An evaluation from its request to its files: passes, results, evaluation.json and report.html."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pvdm_fast.backends.precision import announce, choose_precision
from pvdm_fast.data import ClipDataset, DataError
from pvdm_fast.data.clips import SYNTHETIC
from pvdm_fast.diffusion.sampling import check_pair
from pvdm_fast.errors import Interrupted, UserError
from pvdm_fast.evaluation import features
from pvdm_fast.evaluation.clip_network import ClipFeatures
from pvdm_fast.evaluation.clips import open_clips
from pvdm_fast.evaluation.distances import FEWEST, frechet, kernel
from pvdm_fast.evaluation.features import FeatureNetwork, Networks
from pvdm_fast.evaluation.moments import Gaussian, frechet_distance
from pvdm_fast.evaluation.nearest import nearest_clips
from pvdm_fast.evaluation.passes import (
    SAMPLE_FILES,
    Outcome,
    Pass,
    measure_real_clips,
    measure_reconstructions,
    measure_samples,
    run_pass,
)
from pvdm_fast.evaluation.processes import these_processes
from pvdm_fast.evaluation.protocol import Protocol, Request, count_samples, make_protocol, shows_scenes
from pvdm_fast.evaluation.report import write_report
from pvdm_fast.evaluation.scene_judge import load_judge
from pvdm_fast.evaluation.scenes import CLIP_FEATURES
from pvdm_fast.evaluation.ssim import WINDOW
from pvdm_fast.evaluation.subject import Subject, load_subject
from pvdm_fast.jobs import threads
from pvdm_fast.jobs.environment import only_the_launcher, plain_torch
from pvdm_fast.jobs.files import locked, whole_file
from pvdm_fast.jobs.interrupt import StopRequest
from pvdm_fast.jobs.processes import Processes

PUBLISHED_CLIPS = 2048


@dataclass(frozen=True)
class Evaluation:
    """What the passes have in common."""

    request: Request
    processes: Processes
    subject: Subject
    networks: Networks
    datasets: dict[int, ClipDataset]  # by length; without a named network, those of `lengths` that have clips
    training: ClipDataset | None  # among which samples' nearest clips are looked for, if they can be
    protocol: Protocol
    folder: Path
    records: list[dict[str, Any]]  # training's records at the start of the evaluation: the run may still be training

    @property
    def samples(self) -> int:
        return int(self.protocol.sampling["samples"])

    def passes(self) -> dict[str, Pass]:
        """The passes by name: "reconstruction", "real-16" for each other length with clips, "samples"."""
        request, networks, length = self.request, self.networks, self.subject.frames
        measure = measure_reconstructions(self.subject, self.datasets[length], networks, request.workers, request.shown)
        made = {
            "reconstruction": self._data_pass(
                "reconstruction", measure, "model", "judge", frames=length, shown=request.shown
            )
        }
        for frames in self.datasets:
            if frames != length:
                measure = measure_real_clips(self.datasets[frames], networks, request.workers)
                made[f"real-{frames}"] = self._data_pass(f"real-{frames}", measure, frames=frames)
        if self.samples:
            identity = self.protocol.identity(
                "model", "sampling", "features", "pvdm_fast_features", "judge", stride=request.stride
            )
            sampling, lengths = self.protocol.sampling, request.frames
            measure = measure_samples(self.subject, networks, lengths, request.stride, sampling, request.shown)
            work = Pass("samples", self.samples, request.batch_size, identity, measure, request.shown, SAMPLE_FILES)
            made["samples"] = work
        return made

    def _data_pass(self, name: str, measure: Any, *parts: str, frames: int, shown: int = 0) -> Pass:
        identity = self.protocol.identity("data", "features", "pvdm_fast_features", *parts, frames=frames)
        return Pass(name, self.request.clips, self.request.batch_size, identity, measure, shown)


def evaluate(request: Request) -> tuple[dict[str, Any] | None, Path]:
    """Evaluate a run.

    Returns:
        The results, as in evaluation.json, and their folder. In all processes except the first the results are None.

    Raises:
        UserError: something that you can mend. Interrupted: a signal came, and everything is saved.
    """
    with plain_torch(), only_the_launcher(), threads.chosen(request.threads, request.device):
        return _evaluate(request)


def _evaluate(request: Request) -> tuple[dict[str, Any] | None, Path]:
    processes = these_processes(request.device)
    evaluation = prepare(request, processes)
    with _alone(evaluation), StopRequest(processes) as stop:
        started = time.perf_counter()
        statistics = evaluation.folder / "statistics"
        outcomes: dict[str, Outcome] = {}
        try:
            for name, work in evaluation.passes().items():
                outcomes[name] = run_pass(work, statistics, processes, stop, request.save_every)
            nearest = None
            if processes.main and "samples" in outcomes and evaluation.training is not None:
                nearest = nearest_clips(evaluation, outcomes["samples"].folder, statistics, stop)
        except Interrupted:
            print("stopped and saved; the same command goes on from here", flush=True)
            raise
        if not processes.main:
            return None, evaluation.folder
        result = results(evaluation, outcomes)
        result["nearest"] = nearest
        result["unreadable_files"] |= nearest["unreadable_files"] if nearest is not None else {}
        result["seconds_since_last_start"] = round(time.perf_counter() - started, 1)
        write(evaluation, result, outcomes)
        return result, evaluation.folder


@contextmanager
def _alone(evaluation: Evaluation) -> Iterator[None]:
    """Make the folder and lock it. Raises UserError if another evaluation is running there."""
    if not evaluation.processes.main:
        yield
        return
    try:
        evaluation.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {evaluation.folder}: {error.strerror}") from error
    with locked(evaluation.folder / "evaluation.lock", "evaluation", "--out"):
        yield


def prepare(request: Request, processes: Processes) -> Evaluation:
    """Open everything, so that what doesn't fit is found before anything is computed."""
    if processes.main:
        announce(request.dtype, choose_precision(request.dtype, processes.device), "--dtype")
    subject = load_subject(request.run, processes.device, request.dtype)
    if subject.denoiser is not None:
        from pvdm_fast.diffusion.sampling import fitting_guidance, fitting_steps
        from pvdm_fast.diffusion.schedulers import fitting_name

        check_pair(subject.autoencoder, subject.denoiser)
        request = replace(
            request,
            scheduler=fitting_name(subject.denoiser, request.scheduler),
            steps=fitting_steps(subject.denoiser, request.steps),
            guidance=fitting_guidance(subject.denoiser, request.guidance),
        )
    network = None
    if request.features is not None and request.features_sha256 is not None:
        network = FeatureNetwork(request.features, request.features_sha256, processes.device)
    judge = load_judge(processes.device) if shows_scenes(request) else None
    networks = Networks(ClipFeatures(processes.device), network, judge)
    datasets = _open_lengths(request, subject)
    protocol = make_protocol(request, subject, datasets[subject.frames], networks, processes)
    folder = request.out or request.run / "evaluation"
    records = subject.run.read_metrics()
    training = training_clips(request, subject) if request.nearest_among else None
    return Evaluation(request, processes, subject, networks, datasets, training, protocol, folder, records)


def _open_lengths(request: Request, subject: Subject) -> dict[int, ClipDataset]:
    """Clips of the model's length, and of those at which samples are compared.

    Raises:
        DataError: there are none of the model's length, or, if you named a network, of another one.
    """
    datasets = {}
    for frames in {subject.frames, *(request.frames if count_samples(request, subject) else ())}:
        try:
            datasets[frames] = open_clips(
                request.data,
                request.split,
                frames=frames,
                size=subject.size,
                stride=request.stride,
                seed=request.seed,
                fold=request.fold,
            )
        except DataError:
            if frames == subject.frames or request.features is not None:
                raise
    return dict(sorted(datasets.items()))


def training_clips(request: Request, subject: Subject) -> ClipDataset | None:
    """The training split as it is evaluated. None where the data has none of this length."""
    try:
        return open_clips(
            request.data,
            "train",
            frames=subject.frames,
            size=subject.size,
            stride=request.stride,
            seed=request.seed,
            fold=request.fold,
        )
    except DataError:
        return None


def results(evaluation: Evaluation, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """All scores, what is missing and how to get it, and warnings for the reader."""
    reconstruction = outcomes["reconstruction"].sums
    scores: dict[str, Any] = {"frames": evaluation.subject.frames, "clips": evaluation.request.clips}
    for name in ("psnr", "ssim"):
        scores[name] = _score(reconstruction[name]) if name in reconstruction else None
    if evaluation.networks.named is not None:
        pair = (reconstruction["original"], reconstruction["reconstruction"])
        scores |= _distance(evaluation.networks.named, *(Gaussian.of(sums) for sums in pair))
    rows = outcomes["reconstruction"].rows
    scores["pvdm_fast_features"] = _own_distances(rows["original"], rows["reconstruction"])
    unreadable = {path: reason for outcome in outcomes.values() for path, reason in outcome.unreadable.items()}
    return {
        "reconstruction": scores,
        "generation": _generation(evaluation, outcomes),
        "scenes": _scenes(evaluation, outcomes),
        "missing": _missing(evaluation),
        "caveats": _caveats(evaluation, outcomes),
        "unreadable_files": unreadable,
    }


def _generation(evaluation: Evaluation, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """By number of frames: the distance between samples and real clips."""
    if "samples" not in outcomes:
        return {}
    scores: dict[str, Any] = {}
    for frames in evaluation.request.frames:
        scores[str(frames)] = {"samples": evaluation.samples}
        if frames not in evaluation.datasets:
            continue
        real = outcomes["reconstruction" if frames == evaluation.subject.frames else f"real-{frames}"]
        made, name = outcomes["samples"], f"{frames} frames"
        scores[str(frames)]["real_clips"] = len(real.rows["original"])
        scores[str(frames)]["pvdm_fast_features"] = _own_distances(real.rows["original"], made.rows[name])
        if evaluation.networks.named is not None:
            pair = (real.sums["original"], made.sums[name])
            scores[str(frames)] |= _distance(evaluation.networks.named, *(Gaussian.of(sums) for sums in pair))
    return scores


def _scenes(evaluation: Evaluation, outcomes: dict[str, Outcome]) -> dict[str, Any] | None:
    """What the scene judge says of reconstructions and samples. None for other clips than rendered scenes."""
    if evaluation.networks.judge is None:
        return None
    real = outcomes["reconstruction"].sums
    right, objects = real["kinds_right"][0, 1:].tolist()
    scores: dict[str, Any] = {"objects": int(objects), "kinds_right": right / objects if objects else None}
    if "samples" in outcomes:
        made = outcomes["samples"].sums
        scores["samples"] = evaluation.samples
        scores |= {name: _score(made[name]) for name in ("named", "path", "second_named", "second_path")}
        asked = made.get("of_class")
        right, objects = (0.0, 0.0) if asked is None else asked[0, 1:].tolist()
        scores["of_class"] = right / objects if objects else None
        scores["frechet_distance"] = frechet_distance(Gaussian.of(real["scenes"]), Gaussian.of(made["scenes"]))
    return scores


def _score(sums: Any) -> dict[str, Any]:
    gaussian = Gaussian.of(sums)
    error = float(gaussian.standard_error[0])
    return {"mean": float(gaussian.mean[0]), "standard_error": error if math.isfinite(error) else None}


def _distance(network: FeatureNetwork, real: Gaussian, made: Gaussian) -> dict[str, Any]:
    """The distance. It is called FVD only with the feature network that defines FVD."""
    distance = frechet_distance(real, made)
    release = None
    if network.is_i3d and min(real.count, made.count) > 1:
        release = frechet_distance(real.unbiased, made.unbiased)
    return {
        "frechet_distance": distance,
        "fvd": distance if network.is_i3d else None,
        "fvd_unbiased_covariances": release,
        "features": len(real.mean),
    }


def _own_distances(real: Tensor, made: Tensor) -> dict[str, Any] | None:
    """Both distances in the shipped network's features, with intervals. None if there are too few clips."""
    if min(len(real), len(made)) < FEWEST:
        return None
    found = {"frechet_distance": frechet(real, made), "kernel_distance": kernel(real, made)}
    return {name: dataclasses.asdict(distance) for name, distance in found.items()}


def _missing(evaluation: Evaluation) -> list[str]:
    missing, named = [], evaluation.networks.named
    if named is None:
        missing.append(f"R-FVD and FVD: no feature network was named; {features.HOW_TO_GET}")
    elif not named.is_i3d:
        missing.append(
            f"R-FVD and FVD: {named.path.name} is not the I3D network of StyleGAN-V, so its Fréchet "
            f"distances compare with nothing that is published; {features.HOW_TO_GET}"
        )
    clips, samples = evaluation.request.clips, evaluation.samples
    if min(clips, samples or clips) < FEWEST:
        missing.append(
            f"distances in pvdm_fast's features: {clips} clips and {samples} samples are too few for their intervals; "
            f"ask for {FEWEST} of each at least, with --clips and --samples"
        )
    for frames in evaluation.request.frames if samples else ():
        if frames not in evaluation.datasets:
            missing.append(f"distances at {frames} frames: no video is that long; ask for other lengths with --frames")
    if evaluation.networks.judge is None:
        missing.append(
            f"named objects and their paths: the scene judge knows the rendered scenes of {SYNTHETIC} only, and these "
            f"clips are of {evaluation.request.data}"
        )
    if min(evaluation.subject.size) < WINDOW:
        missing.append(f"SSIM: its window needs frames of {WINDOW} x {WINDOW} at least")
    if evaluation.samples and evaluation.training is None:
        why = "not asked for" if evaluation.request.nearest_among == 0 else "the data has no training clips"
        missing.append(f"nearest training clips of samples: {why}")
    if evaluation.subject.denoiser is None:
        missing.append("samples: the run has no denoiser yet; train it with python -m pvdm_fast.train --resume RUN")
    return missing


def _caveats(evaluation: Evaluation, outcomes: dict[str, Outcome]) -> list[str]:
    caveats = []
    clips, videos = evaluation.request.clips, len(evaluation.datasets[evaluation.subject.frames])
    if clips > videos:
        caveats.append(
            f"{clips} clips of {videos} videos: a video counts more than once, and standard errors are too small"
        )
    if evaluation.networks.named is not None:
        fewest = min(clips, evaluation.samples or clips)
        if fewest < PUBLISHED_CLIPS:
            caveats.append(
                f"{fewest} clips: a Fréchet distance falls as clips are added, and published ones are of "
                f"{PUBLISHED_CLIPS:,}; compare with the same number only"
            )
        width = len(outcomes["reconstruction"].sums["original"]) - 1
        if fewest <= width:
            caveats.append(f"{fewest} clips cannot give covariances of {width} features full rank")
    if evaluation.networks.judge is not None and 0 < evaluation.samples <= CLIP_FEATURES:
        caveats.append(
            f"{evaluation.samples} samples cannot give covariances of the scene judge's {CLIP_FEATURES} features full "
            "rank"
        )
    denoiser = evaluation.subject.denoiser
    if evaluation.samples and denoiser is not None and denoiser.config["num_classes"] is not None:
        caveats.append("the samples are of each class in turn, whatever the classes of the real clips")
    if evaluation.request.split != "test":
        caveats.append(f"the {evaluation.request.split} split holds clips that the models were trained on")
    return caveats


def write(evaluation: Evaluation, result: dict[str, Any], outcomes: dict[str, Outcome]) -> None:
    """Write evaluation.json and report.html, each complete or not at all."""
    folder = evaluation.folder
    names = ("reconstruction", "samples")
    videos = {name: outcomes[name].folder.relative_to(folder) for name in names if name in outcomes}
    if result["nearest"] is not None:
        videos["nearest"] = Path(result["nearest"]["folder"])
    document = {
        "results": result,
        "protocol": evaluation.protocol.as_dict(),
        "run": str(evaluation.request.run),
        "videos": {name: str(path) for name, path in videos.items()},
    }
    try:
        with whole_file(folder / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        with whole_file(folder / "report.html") as temporary:
            shown = {name: folder / path for name, path in videos.items()}
            write_report(temporary, document, shown, evaluation.records)
    except OSError as error:
        raise UserError(f"cannot write the results to {folder}: {error.strerror or error}") from error
